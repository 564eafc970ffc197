"""Cards: what `model.json` and `checkpoint.json` say, as frozen dataclasses.

Each card is one JSON object. `from_json` reads it, and `to_json` writes it with the same keys in the same order.
A key that this version does not know is kept and written again. A field that is None is not written.
In the metadata of a field, `key` is its JSON key where that is not its name, and `card` is the class of its value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Self

from patchloom.models.normalisation import Normalisation, spread_of

MODEL_FORMAT = 2  # of models with a condition, which earlier versions cannot build; of all others 1
CHECKPOINT_FORMAT = 1
CONTROLNET = "controlnet"  # the name of the network that a base model has its part in


@dataclass(frozen=True, kw_only=True)
class Card:
    """The base of all cards: a JSON object with known fields.

    Args:
        other: the keys that this version does not know, with their JSON values.
    """

    other: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, content: object) -> Self:
        """Read the card from parsed JSON.

        Raises:
            ValueError: `content` is not an object, or a required key is missing.
        """
        if not isinstance(content, Mapping):
            raise ValueError(f"found a {type(content).__name__} instead of a JSON object")
        known = cls._fields()
        missing = [key for key, entry in known.items() if key not in content and entry.default is MISSING]
        if missing:
            raise ValueError(f"the key {missing[0]} is missing")
        values = {entry.name: _read(content[key], entry) for key, entry in known.items() if key in content}
        return cls(**values, other={key: value for key, value in content.items() if key not in known})

    def to_json(self) -> dict[str, Any]:
        """The card as JSON values, in the order of its fields, then the unknown keys."""
        values = {key: getattr(self, entry.name) for key, entry in self._fields().items()}
        return {key: _plain(value) for key, value in values.items() if value is not None} | dict(self.other)

    @classmethod
    def _fields(cls) -> dict[str, Field[Any]]:
        return {entry.metadata.get("key") or entry.name: entry for entry in fields(cls) if entry.name != "other"}


def _read(value: Any, entry: Field[Any]) -> Any:
    card = entry.metadata.get("card")
    if card is not None:
        return None if value is None else card.from_json(value)
    return tuple(value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Card | Normalisation):
        return value.to_json()
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig(Card):
    """The constructor arguments of a denoiser: enough to build it without its weights.

    Args:
        network: "song", "dhariwal", "controlnet", or "package.module:Class" for a backbone from another package.
        network_options: further keyword arguments of the network's constructor.
        resolution: side of a full image or latent, in pixels.
        channels: channels of the image or latent.
        classes: number of classes, 0 for an unconditional model.
        coordinates: encoding of the patch coordinates: "none", "linear", "implicit" or "periodic".
        patch_size: whether the network also gets the patch size. None in models from EDM snapshots: no.
        condition_channels: channels of the condition image that the network also gets. None: no condition.
        sigma_data: standard deviation of the data that the preconditioning assumes.
    """

    network: str
    network_options: Mapping[str, Any]
    resolution: int
    channels: int
    classes: int
    coordinates: str
    patch_size: bool | None = None
    condition_channels: int | None = None
    sigma_data: float

    def __post_init__(self) -> None:
        if isinstance(self.coordinates, bool):  # early models of format 1 hold true or false
            object.__setattr__(self, "coordinates", "linear" if self.coordinates else "none")

    @property
    def title(self) -> str:
        """The network by its name in recipes and in the literature: `ddpmpp`, `ncsnpp`, `adm`, or a backbone's."""
        if self.network == "song":  # EDM's SongUNet is both, depending on its options
            return "ncsnpp" if self.network_options.get("embedding") == "fourier" else "ddpmpp"
        return {"dhariwal": "adm"}.get(self.network, self.network)


# the smallest and largest value of each number of a network's configuration
NETWORK_BOUNDS = {
    "resolution": (1, 1 << 16),
    "channels": (1, 1 << 12),
    "classes": (0, 1 << 20),
    "condition_channels": (0, 1 << 16),
    "sigma_data": (1e-6, 1e6),
    "width": (1, 1 << 14),
    "width_multipliers": (1, 1 << 8),
    "blocks": (0, 64),
    "attention": (0, 1 << 16),
    "dropout": (0, 1),
    "filter_taps": (-1e3, 1e3),
    "noise_width_multiplier": (1, 64),
    "stem": (1, 1 << 14),
    "augmentation": (0, 1 << 10),
}
MOST_LISTED = 64  # levels, layers of a stem, taps, ...


def check_bounds(config: DenoiserConfig) -> None:
    """Raise ValueError if a number of a configuration is beyond any network, or no number."""
    options = {} if ":" in config.network else dict(config.network_options)
    given = {name: getattr(config, name) for name in ("resolution", "channels", "classes", "sigma_data")} | options
    given["condition_channels"] = 0 if config.condition_channels is None else config.condition_channels
    for name, (low, high) in NETWORK_BOUNDS.items():
        values = given.get(name, low)
        listed = values if isinstance(values, (list, tuple)) else (values,)
        if len(listed) > MOST_LISTED:
            raise ValueError(f"{name} has {len(listed):,} values, and at most {MOST_LISTED} are read")
        for value in listed:
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not low <= value <= high:
                raise ValueError(f"{name} is {str(value)[:80]}, and must be a number from {low:g} to {high:g}")


@dataclass(frozen=True, kw_only=True)
class AutoencoderCard(Card):
    """The autoencoder of a latent dataset or model.

    Args:
        class_name: diffusers' name of the class, or "package.module:Class".
        weights_sha256: sha256 of its safetensors.
        downscale: image pixels per latent pixel, along one side.
        latent_channels: channels of a latent.
        scale: a latent enters a network as (latent - shift) * scale, unless it is whitened or has `latents_mean`.
        shift: see `scale`.
        latents_mean: mean per channel of an autoencoder that knows it; replaces `shift`.
        latents_std: standard deviation per channel of such an autoencoder; divides `scale`.
        reference: where it came from, such as `models:/NAME/VERSION`. None if not known.
        precision: precision of the encoder, "fp32" or "bf16". None before anything is encoded.
    """

    class_name: str = field(metadata={"key": "class"})
    weights_sha256: str
    downscale: int
    latent_channels: int
    scale: float
    shift: float = 0.0
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    reference: str | None = None
    precision: str | None = None

    def normalisation(self) -> Normalisation:
        """The map from its latents to a network: (z - mean) * scale / std, as the AutoencoderKL of diffusers says."""
        mean = self.latents_mean or (self.shift,) * self.latent_channels
        stds = self.latents_std or (1.0,) * self.latent_channels
        spreads = (spread_of(*channel) for channel in zip(mean, stds, strict=True))
        return Normalisation("latents", mean, tuple(self.scale / spread for spread in spreads))


@dataclass(frozen=True, kw_only=True)
class ConditionCard(Card):
    """The condition of a model: an image that its network gets next to the noisy image.

    Args:
        kind: what it is: "edges", "low-res", or "images" and arrays from a source of their own.
        factor: for "low-res", the side of the image over that of the low-resolution image.
        channels: channels K of a condition image, which has the size of the image in pixels.
        dtype: type of its values: "uint8", "float16" or "float32".
        downscale: side f of the blocks of pixels that are channels of one pixel of the network: 1 for pixels, and the
            downscale of the autoencoder for latents. The network gets K * f^2 channels.
        mean: one per channel K, in stored units.
        scale: one per channel K. The network gets (value - mean) * scale.
        dropout: share of crops in training whose condition was replaced by zeros. Guidance needs more than 0.
        crop: how the images of the dataset were cropped: "center", "dhariwal", "none" or "windows". None if not known.
        resize: the filter that they were resized with. None if not known.
    """

    kind: str
    factor: int | None = None
    channels: int
    dtype: str
    downscale: int
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    dropout: float = 0.0
    crop: str | None = None
    resize: str | None = None

    @property
    def summary(self) -> str:
        """What the condition is, in a few words."""
        factor = f" by {self.factor}" if self.factor else ""
        return f"{self.kind}{factor}, {self.channels} channel{'s' if self.channels > 1 else ''} of {self.dtype}"

    def normalisation(self) -> Normalisation:
        """The map from stored values, K * f^2 channels, to those of the network."""
        repeated = ([value for value in values for _ in range(self.downscale**2)] for values in (self.mean, self.scale))
        return Normalisation("pixels", *map(tuple, repeated))


@dataclass(frozen=True, kw_only=True)
class PatchesCard(Card):
    """How a model was trained on patches (Patch Diffusion, Eq. 5); `other` holds the recipe's other keys.

    Args:
        p: ratio of steps on full-size images.
        schedule: "stochastic" or "progressive".
    """

    p: float
    schedule: str


@dataclass(frozen=True, kw_only=True)
class ImportCard(Card):
    """The file that an imported model came from: its name and sha256."""

    file: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class AverageCard(Card):
    """The average that was made after training (EDM2, section 3.2).

    Args:
        sigma_rel: its relative width.
        snapshots: number of kept averages that it was made from.
    """

    sigma_rel: float
    snapshots: int


@dataclass(frozen=True, kw_only=True)
class ModelCard(Card):
    """All of `model.json`.

    Args:
        name: name of the recipe or of the imported file.
        denoiser: the network.
        normalisation: the map from stored values to the network's.
        autoencoder: the decoder of a latent model.
        class_names: names of the classes, in the order of their numbers.
        empty_classes: numbers of classes without training images. None if there are none.
        label_dropout: share of labels that training dropped. Guidance needs more than 0.
        condition: the condition images of the model. None if it has none.
        patches: how the model was trained on patches. None for imports.
        imported_from: the imported file. None for trained models.
        dataset_fingerprint: the training dataset. None for imports.
        code_version: version of Patchloom that made the model.
        images_seen: counted images (crops) of the training. None for imports.
        updates: optimisation steps. None for imports.
        average: the average made after training, if the weights are one.
        tied: names of weights that the network shares, with the first name of each. Both names are saved.
        weights_sha256: sha256 of `model.safetensors`; `save_model` sets it.
    """

    format_version: int = 1
    kind: str = "denoiser"
    name: str = ""
    denoiser: DenoiserConfig = field(metadata={"card": DenoiserConfig})
    normalisation: Normalisation = field(metadata={"key": "space", "card": Normalisation})
    autoencoder: AutoencoderCard | None = field(metadata={"card": AutoencoderCard}, default=None)
    class_names: tuple[str, ...] = ()
    empty_classes: tuple[int, ...] | None = None
    label_dropout: float = 0.0
    condition: ConditionCard | None = field(metadata={"card": ConditionCard}, default=None)
    patches: PatchesCard | None = field(metadata={"card": PatchesCard}, default=None)
    imported_from: ImportCard | None = field(metadata={"card": ImportCard}, default=None)
    dataset_fingerprint: str | None = None
    code_version: str = ""
    images_seen: int | None = None
    updates: int | None = None
    average: AverageCard | None = field(metadata={"card": AverageCard}, default=None)
    tied: Mapping[str, str] | None = None
    weights_sha256: str = ""

    @property
    def downscale(self) -> int:
        """Image pixels per pixel of the network along a side: 1 for models of pixels."""
        return self.autoencoder.downscale if self.autoencoder else 1

    @property
    def image_side(self) -> int:
        """Side of the images that the model was trained on, in pixels."""
        return self.denoiser.resolution * self.downscale

    @property
    def sampled_classes(self) -> list[int]:
        """The numbers of the classes that are sampled by default: those with training images."""
        return [number for number in range(self.denoiser.classes) if number not in (self.empty_classes or ())]


@dataclass(frozen=True, kw_only=True)
class CheckpointCard(Card):
    """All of `checkpoint.json`.

    Args:
        step: optimisation steps taken.
        images_seen: counted images (crops).
        crops_by_size: crops of each patch size, full images first.
        grad_scaler: state of torch's GradScaler; empty unless the precision is fp16.
        recipe: name of the recipe.
        held_out_loss: the last held-out loss, if one was measured.
        state_sha256: sha256 of `state.safetensors`; `write_checkpoint` sets it.
    """

    format_version: int = CHECKPOINT_FORMAT
    step: int
    images_seen: int
    crops_by_size: tuple[int, ...]
    grad_scaler: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = ""
    held_out_loss: float | None = None
    state_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class FeaturesCard(Card):
    """The network that features come from; distances of features from different networks cannot be compared.

    Args:
        name: name of the network.
        sha256: sha256 of its weights.
        resize: how images are resized for it.
    """

    name: str = field(metadata={"key": "features"})
    sha256: str = field(metadata={"key": "features_sha256"})
    resize: str
