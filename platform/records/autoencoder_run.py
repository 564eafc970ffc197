"""Records of an autoencoder's run folder: its settings, and the `run.json` that holds them and the quality."""

from dataclasses import dataclass

from patchloom.platform.records.run import RunCard


@dataclass(frozen=True)
class AutoencoderSettings:
    """What an autoencoder is and how it is trained.

    Args:
        widths: channels at each resolution; the image is halved between two of them.
        latent_channels: channels of a latent pixel.
        images: image patches to train on.
        batch_size: patches in a step.
        patch: side of a training patch in pixels. An autoencoder without attention learns as well on patches.
        lr: learning rate after the ramp.
        kl_weight: weight of the KL divergence in the loss.
        held_out_fraction: share of the rows that measures the quality and is not trained on.
        seed: seed of the weights, the rows and the patches.
        init_from: an autoencoder whose weights the training starts from; it also sets `widths` and
            `latent_channels`.
    """

    widths: tuple[int, ...] = (16, 32, 32)
    latent_channels: int = 4
    images: int = 7_000
    batch_size: int = 8
    patch: int = 32
    lr: float = 2e-3
    kl_weight: float = 1e-4
    held_out_fraction: float = 0.1
    seed: int = 0
    init_from: str | None = None

    @property
    def steps(self) -> int:
        """Optimisation steps of the run."""
        return max(1, self.images // self.batch_size)


class AutoencoderRunCard(RunCard):
    """`run.json` of an autoencoder. The quality is set once training is finished, `reference` once it is registered."""

    kind: str = "autoencoder"
    settings: AutoencoderSettings
    psnr_db: float | None = None
    ssim: float | None = None
    measured_images: int | None = None
    reference: str | None = None  # models:/NAME/VERSION
