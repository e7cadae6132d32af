"""Hidden states of the vision half, which every model has: for linear probes, segmentation heads and the like."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import ContrastiveConfig, InternVLConfig
from .errors import InvalidRequestError, UnsupportedError
from .image import ImageSource, open_image
from .loaded import LoadedModel
from .models.internvl import InternVLModel
from .prefetch import batched, prefetched
from .request import VisionFeatures
from .resize import ImageSize, fit_image, read_image_size

Images = ImageSource | Sequence[ImageSource] | None

# Images in one pass: enough to fill the matrix products, few enough to bound the activations.
IMAGES_PER_BATCH = 16


class FeatureCalls(LoadedModel):
    """`features`, of whatever model is loaded."""

    @torch.no_grad()  # and not inference mode, whose tensors no probe could be trained on
    def features(
        self,
        images: Images,
        layers: Sequence[int] | None = None,
        *,
        image_size: ImageSize | None = None,
        crop: bool = False,
    ) -> dict[int, VisionFeatures]:
        """Hidden states of the ViT, each image as one input.

        layers: block numbers, 1-based, 0 being the embeddings, negative ones counted from the last; None is the last.
        Blocks behind the deepest one asked for do not run.
        image_size: pixels, a multiple of the patch size, or (height, width); None is the checkpoint's own. Positions
        are interpolated to it. crop: cut the middle out of the image instead of stretching it.
        Returns, under each number asked for (-1 if none was), `class_token` (n, hidden), `patches` (n, rows, columns,
        hidden) and `pooled` (n, 2 * hidden), the class token followed by the mean patch. No norm is applied to them.
        """
        self._check_open()
        if isinstance(self._model, InternVLModel) and not self._model.part.vision:
            raise UnsupportedError("features: the vision half is in other processes; load with placement='colocated'")
        vision = self._model.vision_model
        patch = vision.config.patch_size
        size = read_image_size(image_size, self._own_image_size(), patch)
        sources = as_list(images)
        if not sources:
            raise InvalidRequestError("features needs at least one image")
        depth = len(vision.encoder.layers)
        asked = (-1,) if layers is None else layers
        within = range(-depth - 1, depth + 1)
        if not isinstance(asked, list | tuple | range) or not asked or not all(layer in within for layer in asked):
            raise InvalidRequestError(f"layers={layers!r}: must be a list of integers from -{depth + 1} to {depth}")
        wanted = {layer: int(layer) % (depth + 1) for layer in asked}

        def load(numbered: tuple[int, ImageSource]) -> Tensor:
            image = open_image(numbered[1], self.limits, name=f"image {numbered[0]}")
            return torch.from_numpy(fit_image(image, size, crop=crop))

        parts: dict[int, list[Tensor]] = {block: [] for block in wanted.values()}
        for tiles in batched(prefetched(load, enumerate(sources, start=1), IMAGES_PER_BATCH), IMAGES_PER_BATCH):
            for block, state in vision.hidden_states(torch.stack(tiles).to(self.device), set(parts)).items():
                parts[block].append(state)
        grid = (size[0] // patch, size[1] // patch)
        found = {block: _features(torch.cat(states), grid) for block, states in parts.items()}
        return {layer: found[block] for layer, block in wanted.items()}

    def _own_image_size(self) -> int:
        config = self._model.config
        if isinstance(config, InternVLConfig):
            return config.tile_size
        return config.vision.image_size if isinstance(config, ContrastiveConfig) else config.image_size


def as_list(images: Images) -> list[ImageSource]:
    """One image, several or none as a list. A string is one path, an array one image."""
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return list(images)
    return [images]  # type: ignore[list-item]


def _features(state: Tensor, grid: tuple[int, int]) -> VisionFeatures:
    class_token, patches = state[:, 0], state[:, 1:]
    return VisionFeatures(
        class_token=class_token,
        patches=patches.unflatten(1, grid),
        pooled=torch.cat((class_token, patches.mean(1)), dim=-1),
    )
