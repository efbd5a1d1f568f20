"""A registration of physiotwin4d (Project-MONAI) by one of our bundles."""

import logging
import os
from typing import Any

from physiotwin4d.register_images_base import RegisterImagesBase

from common.run.registrar import Registrar
from common.space import mapping
from common.space.itk_maps import to_itk_transform

CT_RANGE = [-1000, 1000]  # Hounsfield units that become 0 and 1


class RegisterImagesBundle(RegisterImagesBase):
    """Registers by a bundle; masks, start transforms, chains and time series are those of physiotwin4d.

    Args:
        bundle: name or folder of a bundle; by default MIND features, which need no training.
        config: one more config, laid over its inference.json.
        log_level: of logging.
        options: of inference.json, as refine_steps=50. For the modality "ct", physiotwin4d's default, values from -1000
            to 1000 are used if intensity_range is not among them.
    """

    def __init__(
        self,
        bundle: str | os.PathLike = "samconvex",
        *,
        config: str | os.PathLike = "",
        log_level: int | str = logging.INFO,
        **options: Any,
    ) -> None:
        super().__init__(log_level=log_level)
        if not options and bundle == "samconvex":
            options = {"features": "mind", "refine_steps": 50}
        self.options = options
        self.registrar = Registrar(bundle, config=config, **options)

    def registration_method(
        self, moving_image: Any, moving_mask: Any = None, moving_labelmap: Any = None, moving_image_pre: Any = None
    ) -> dict[str, Any]:
        """Transforms that warp the moving image onto the fixed grid and back, and 1 - NCC of the result.

        Raises:
            ValueError: no fixed image is set; InputError: what the bundle says of an image.
        """
        if self.fixed_image is None:
            raise ValueError("Fixed image must be set before registration.")
        given = {"moving_mask": moving_mask, "fixed_mask": self.fixed_mask, "moving_label": moving_labelmap}
        given |= {"fixed_label": self.fixed_labelmap}
        more = {"intensity_range": CT_RANGE} if self.modality == "ct" and "intensity_range" not in self.options else {}
        asked = {name: image for name, image in given.items() if image is not None} | more
        result = self.registrar.register(moving_image, self.fixed_image, **asked)
        for warning in result.warnings:
            self.log_warning(warning)
        return {
            "forward_transform": to_itk_transform(result.transform),
            "inverse_transform": to_itk_transform(mapping.invert(result.transform)),
            "loss": 1 - result.row["ncc_after"],
        }
