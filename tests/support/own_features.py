"""Your own features for `patchloom evaluate --features features.pt`; an excerpt of docs/how-to/own-metric.md."""

# --8<-- [start:features]
import torch
from torch import Tensor, nn


class Brightness(nn.Module):
    """The mean of each of 4 x 4 tiles, in grey."""

    def forward(self, images: Tensor) -> Tensor:
        grey = images.float().mean(1, keepdim=True) / 255
        return nn.functional.adaptive_avg_pool2d(grey, 4).flatten(1)


torch.jit.script(Brightness()).save("features.pt")
# --8<-- [end:features]
