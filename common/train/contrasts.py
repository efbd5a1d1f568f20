"""Images of label maps in made-up contrasts, with what scanners and preprocessing do to them.

Source: Hoffmann et al., SynthMorph, IEEE TMI 2022, and the generators of anatomix and of ivadomed for the kinds and the
    ranges; tissues of several labels, thick slices by averages and the cut field of view are ours.
"""

import math

import torch
from torch import Generator, Tensor

from common.train.shapes import Anatomy, along_axes, chance, integer, noise, put, single, uniform


def scale_foreground(image: Tensor) -> Tensor:
    """To [0, 1]: 0 stays, the 99.5th percentile of the voxels above 0 becomes 1; the rule of `ScaleForegroundd`."""
    if image.device.type == "cpu":
        inside = image[image > 0]
        if not len(inside):
            return image.clamp(0, 1)
        high = inside.kthvalue(1 + round(0.995 * (len(inside) - 1))).values
    else:  # the same number by a sort of all voxels, so that nobody waits for their count
        last = (image > 0).sum() - 1
        place = (image.numel() - 1 - last + (0.995 * last.double()).round().long()).clamp(max=image.numel() - 1)
        high = image.flatten().sort().values.gather(0, place[None])[0]
    return (image / high.clamp(min=1e-6)).clamp(0, 1)


def draw_greys(generator: Generator, tissue: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the grey values of each label: (labels,) each, on the CPU.

    Tissues have means in [0.1, 1] and deviations in [0, 0.08]; labels of one tissue differ by up to a few hundredths.
    """
    tissues, generator = int(tissue.max()) + 1, single(generator)
    means = 0.1 + 0.9 * torch.rand(tissues, generator=generator)
    spread = 0.08 * torch.rand(tissues, generator=generator)
    apart = uniform(generator, 0, 0.04) * torch.randn(len(tissue), generator=generator)
    return (means[tissue] + apart).clamp(0.05, 1), spread[tissue]


def blur_matrix(n: int, deviation: float, slices: int) -> Tensor:
    """(n, n): Gaussian blur along an axis, then means of `slices` neighbours, linear between their middles."""
    at = torch.arange(n, dtype=torch.float32)
    blur = torch.exp(-0.5 * ((at[:, None] - at) / max(deviation, 1e-3)).square())
    blur = blur / blur.sum(1, keepdim=True)
    if slices == 1:
        return blur
    count = math.ceil(n / slices)
    block = (at[None] // slices == torch.arange(count)[:, None]).float()
    block = block / block.sum(1, keepdim=True)
    middle = block @ at
    back = (1 - (at[:, None] - middle).abs() / slices).clamp(min=0)  # a hat over each middle
    return (back / back.sum(1, keepdim=True)) @ block @ blur


def paint(generator: Generator, label: Tensor, greys: tuple[Tensor, Tensor], zero: bool) -> Tensor:
    """One image (I, J, K) in [0, 1] of a label map (I, J, K).

    Args:
        greys: of `draw_greys`.
        zero: label 0 is background, cut out.
    """
    size, body = tuple(label.shape), label > 0
    mean, spread = (put(table, generator)[label] for table in greys)
    grain = torch.randn(size, generator=generator, device=generator.device)
    texture = 0.06 * uniform(generator, 0, 1) * noise(generator, 1, size, uniform(generator, 2, 6))[0]
    image = (mean + spread * grain + texture).clamp(min=0)
    if zero:
        image = image * body
    thick = integer(generator, 0, 2) if chance(generator, 0.25) else None
    slices = [integer(generator, 2, 4) if axis == thick else 1 for axis in range(3)]
    deviation = uniform(generator, 0, 1)
    blurs = (put(blur_matrix(n, deviation, s), generator) for n, s in zip(size, slices))
    image = along_axes(image[None], tuple(blurs))[0]
    bias = uniform(generator, 0, 0.3) * noise(generator, 1, size, uniform(generator, 24, 40))[0]
    image = scale_foreground(image * bias.exp())
    image = image ** math.exp(0.25 * float(torch.randn((), generator=single(generator))))
    if chance(generator, 0.05):
        image = broken(image, put(torch.rand(6, generator=single(generator)), generator))
    return scale_foreground(image * body if zero else image)


def broken(image: Tensor, table: Tensor) -> Tensor:
    """Grey values of [0, 1] through a table of values at equal distances, linear between them."""
    place = image * (len(table) - 1)
    low = place.floor().long().clamp(0, len(table) - 2)
    return torch.lerp(table[low], table[low + 1], place - low)


def cut_view(generator: Generator, image: Tensor) -> Tensor:
    """Zero slabs of up to an eighth of the grid (I, J, K), at each of its six sides in one case of three."""
    image = image.clone()
    for axis, n in enumerate(image.shape):
        for end in (False, True):
            if chance(generator, 1 / 3):
                width = integer(generator, 1, max(n // 8, 1))
                image.narrow(axis, n - width if end else 0, width).zero_()
    return image


def draw_images(generator: Generator, anatomy: Anatomy, label: Tensor, shared: bool) -> Tensor:
    """Images (2, I, J, K) in [0, 1] of label maps (2, I, J, K).

    Args:
        shared: both in one contrast, as two scans of one modality; else each in its own.
    """
    greys = [draw_greys(generator, anatomy.tissue)]
    greys.append(greys[0] if shared else draw_greys(generator, anatomy.tissue))
    zero = anatomy.outside and chance(generator, 0.6)
    images = [paint(generator, *both, zero) for both in zip(label, greys)]
    if chance(generator, 0.25):
        which = integer(generator, 0, 1)
        images[which] = scale_foreground(cut_view(generator, images[which]))
    return torch.stack(images)
