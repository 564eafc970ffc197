"""Data shapes: all that a network and its costs depend on in a dataset, also where there is no dataset yet."""

import re
from dataclasses import dataclass, replace
from typing import Literal

from patchloom.errors import UserError
from patchloom.models.cards import NETWORK_BOUNDS
from patchloom.platform.dataset.labels import MOST_CLASSES
from patchloom.platform.dataset.prepared import Dataset, open_dataset


@dataclass(frozen=True)
class DataShape:
    """The shape of images or latents.

    Args:
        kind: "pixels" or "latents".
        resolution: side of an image or latent.
        channels: channels of an image or latent.
        classes: number of classes; 0 for none.
        condition_channels: channels of the conditions at this resolution; 0 for none.
        downscale: pixels of a condition image per pixel of this resolution, along one side.
        text: tokens and width of the text embeddings; None for none.
    """

    kind: Literal["pixels", "latents"]
    resolution: int
    channels: int
    classes: int = 0
    condition_channels: int = 0
    downscale: int = 1
    text: tuple[int, int] | None = None

    @staticmethod
    def of(data: "Dataset | DataShape") -> "DataShape":
        """The shape of a dataset."""
        if isinstance(data, DataShape):
            return data
        card, condition = data.card, data.card.condition
        conditions = condition.channels * condition.downscale**2 if condition else 0
        text = (card.text.tokens, card.text.width) if card.text else None
        return DataShape(
            card.kind, card.resolution, card.channels, len(card.classes), conditions,
            condition.downscale if condition else 1, text,
        )  # fmt: skip

    @staticmethod
    def parse(
        text: str, classes: int = 0, conditions: int = 0, kind: Literal["pixels", "latents"] | None = None
    ) -> "DataShape":
        """The shape that a text such as 64x64x3 means: height, width and channels.

        Args:
            text: the text.
            classes: number of classes.
            conditions: channels of the condition images.
            kind: what the data are. Default: pixels.

        Raises:
            UserError: the text has another form, or the images are not square.
        """
        match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})x([0-9]{1,9})", text)
        if not match:
            raise UserError(f"--like {text} is not height x width x channels: write it as 64x64x3")
        height, width, channels = map(int, match.groups())
        if height != width:
            raise UserError(
                f"--like {text}: images are square after `patchloom prepare`; write {height}x{height}x{channels}"
            )
        for name, value in {"resolution": height, "channels": channels, "condition_channels": conditions}.items():
            least, most = NETWORK_BOUNDS[name]
            if not least <= value <= most:
                raise UserError(f"--like {text}: {name} {value} is not between {least} and {most}")
        if not 0 <= classes <= MOST_CLASSES:
            raise UserError(f"--like-classes {classes} is not between 0 and {MOST_CLASSES}")
        return DataShape(kind or "pixels", height, channels, classes, conditions)

    def for_base(self, text: tuple[int, int], downscale: int) -> "DataShape":
        """The shape with texts, and with conditions of more pixels, as for the base of a ControlNet."""
        if self.text is not None:
            return self
        return replace(self, condition_channels=self.condition_channels * downscale**2, downscale=downscale, text=text)

    def __str__(self) -> str:
        classes = f" of {self.classes:,} classes" if self.classes else ""
        conditions = f" with conditions of {self.condition_channels} channels" if self.condition_channels else ""
        return f"{self.resolution} x {self.resolution} x {self.channels} {self.kind}{classes}{conditions}"


def opened(data: str | DataShape) -> Dataset | DataShape:
    """The dataset at a path or address; a shape stays a shape."""
    return data if isinstance(data, DataShape) else open_dataset(data)
