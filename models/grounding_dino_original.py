"""Grounding DINO by its authors' own code, `groundingdino-py`, for hosts with a CUDA torchvision.

The text encoder's wrapper is ours: the package's calls methods that BERT in transformers 5 no longer has.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor, nn

from models.grounding_dino import normalise_prompt, read_boxes
from models.person_detector import Persons
from models.pretrained import choose_device
from models.weights import WeightsError

SHORT_SIDE_PX, LONG_SIDE_PX = 800, 1333
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class GroundingDinoOriginal:
    """Grounding DINO from an upstream checkpoint.

    Args:
        folder: With one `.pth` checkpoint, the `.py` settings that belong to it, and `bert-base-uncased`, the folder of
            the text encoder.
        prompt: What is looked for.
        device: Where it runs; None takes an accelerator where there is one.

    Raises:
        WeightsError: The package, or one of the files, is not there.
    """

    def __init__(self, folder: Path, prompt: str, device: str | None = None) -> None:
        try:
            from groundingdino.models.GroundingDINO import groundingdino as package
            from groundingdino.util.slconfig import SLConfig
            from groundingdino.util.utils import clean_state_dict
        except ImportError as error:
            raise WeightsError(f"{error}: install `moviedreamer[groundingdino]`, or set people.detector") from error
        checkpoint, config = (next(iter(sorted(folder.glob(f"*.{kind}"))), None) for kind in ("pth", "py"))
        bert = folder / "bert-base-uncased"
        if checkpoint is None or config is None or not bert.is_dir():
            raise WeightsError(f"{folder} lacks the .pth checkpoint, its .py settings, or the folder bert-base-uncased")
        self._device = choose_device(device)
        settings = SLConfig.fromfile(str(config))
        settings.device, settings.text_encoder_type = self._device, str(bert)
        package.BertModelWarper = TextEncoder
        model = package.build_groundingdino(settings)
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        missing, _ = model.load_state_dict(clean_state_dict(state["model"]), strict=False)
        if missing:
            raise WeightsError(f"{checkpoint} lacks {missing[0]}, which {config.name} asks for")
        self._model: Any = model.eval().to(self._device)
        self._prompt = normalise_prompt(prompt)

    @torch.inference_mode()
    def detect(self, image: UInt8[ndarray, "height width 3"], min_score: float) -> Persons:
        """See `models.grounding_dino.GroundingDino.detect`."""
        found = self._model(prepare_picture(image)[None].to(self._device), captions=[self._prompt])
        return read_boxes(
            found["pred_boxes"][0], found["pred_logits"][0].sigmoid().amax(-1), image.shape[:2], min_score
        )


class TextEncoder(nn.Module):
    """BERT whose words attend to those of their own phrase; parts are named as in upstream checkpoints."""

    def __init__(self, bert_model: Any) -> None:
        super().__init__()
        self.config = bert_model.config
        self.embeddings, self.encoder, self.pooler = bert_model.embeddings, bert_model.encoder, bert_model.pooler

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The words' last hidden states; the mask is (batch, word, word), true where one may see the other."""
        hidden = self.embeddings(input_ids=input_ids, position_ids=position_ids, token_type_ids=token_type_ids)
        blocked = ~attention_mask.bool()[:, None]
        mask = torch.zeros(blocked.shape, dtype=hidden.dtype, device=hidden.device)
        mask = mask.masked_fill(blocked, torch.finfo(hidden.dtype).min)
        return {"last_hidden_state": self.encoder(hidden, attention_mask=mask)[0]}


def prepare_picture(image: UInt8[ndarray, "height width 3"]) -> Tensor:
    """A picture as the network reads it: short side 800 px where the long side then has at most 1333."""
    height, width = image.shape[:2]
    scale = min(SHORT_SIDE_PX / min(height, width), LONG_SIDE_PX / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    scaled = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR), np.float32) / 255
    return torch.from_numpy((scaled - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)
