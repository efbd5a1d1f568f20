"""Networks as small as they can be, for tests of what runs them."""

from torch import Tensor, nn


class Dummy(nn.Module):
    """The smallest registration network: a convolution that gives three channels."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image)
