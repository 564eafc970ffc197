"""The method of Patch Diffusion in pure torch: networks, patches, losses, samplers and checkpoints."""
