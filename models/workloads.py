"""The paper profile's networks at work: how each is built at its published size, and what one run of it is.

Each is built by the class that the project loads it with, from `models.published_sizes`, with random weights, and run
on inputs of the size that it gets in the profile. `models.footprint` measures runs on fake tensors; a benchmark times
them on an accelerator. What trains, and the story model, stand in `models.training_workloads`.

Dimensions: batch; words = positions of a prompt; side, height, width in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from torch import Tensor, nn
from transformers import DynamicCache

from models.footprint import Footprint, measure
from models.published_sizes import PUBLISHED, Sizes

PROMPT_WORDS = 600
"""Words of a question beside its picture: the prompts of the captions stage with their schema, about."""


@dataclass(frozen=True)
class Workload:
    """A network and one run of it.

    Attributes:
        name: That of the weights, and what of them runs.
        unit: What a run works on, such as `picture`.
        count: How many of them a run works on.
        build: Given a device, the network with random weights on it.
        run: One run; gives its tensors.
        settings: What beside name and count tells it from others.
        network: Those of one network can run on the same weights; its own name where there is no other.
    """

    name: str
    unit: str
    count: int
    build: Callable[[str], nn.Module]
    run: Callable[[Any], Any]
    settings: str = ""
    network: str = ""

    def footprint(self) -> Footprint:
        """What a run needs; see `models.footprint.measure`."""
        return measure(lambda: self.build("cpu"), self.run)


def build_on(device: str, family: Callable[..., nn.Module], *args: Any, dtype: torch.dtype = torch.float32,
             **fields: Any) -> nn.Module:  # fmt: skip
    """A network with random weights, made where it runs, ready for inference."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = family(*args, **fields)
    finally:
        torch.set_default_dtype(before)
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # part of loading, and left out where weights are not drawn
    return model.eval().requires_grad_(False)


def _inputs(model: nn.Module, *shape: int) -> Tensor:
    """Random numbers where the model is, in its type."""
    parameter = next(model.parameters())
    return torch.randn(shape, device=parameter.device, dtype=parameter.dtype)


def _words(model: nn.Module, *ids: int) -> Tensor:
    return torch.tensor([ids], device=next(model.parameters()).device)


def clip_patches(sizes: Sizes = PUBLISHED, pictures: int = 16) -> Workload:
    """The frozen image encoder, as `models.image_encoder.ClipPatches` runs it."""
    fields = sizes["clip_vit_l14"]["vision"]

    @torch.no_grad()
    def run(model: Any) -> Tensor:
        side = fields["image_size"]
        return model(pixel_values=_inputs(model, pictures, 3, side, side), output_hidden_states=True).hidden_states[-2]

    config = transformers.CLIPVisionConfig(**fields)
    return Workload(
        "clip_vit_l14 vision",
        "picture",
        pictures,
        lambda device: build_on(device, transformers.CLIPVisionModel, config),
        run,
    )


def clip(sizes: Sizes = PUBLISHED, pictures: int = 32) -> Workload:
    """Both towers of CLIP, as `models.clip.Clip` runs them: as many texts as pictures."""
    parts = sizes["clip_vit_l14"]

    @torch.no_grad()
    def run(model: Any) -> tuple[Tensor, Tensor]:
        side, longest = parts["vision"]["image_size"], parts["text"]["max_position_embeddings"]
        words = _words(model, *[1] * (longest - 1), parts["text"]["eos_token_id"]).expand(pictures, -1)
        found = model.get_image_features(pixel_values=_inputs(model, pictures, 3, side, side)).pooler_output
        return found, model.get_text_features(input_ids=words, attention_mask=torch.ones_like(words)).pooler_output

    config = transformers.CLIPConfig(vision_config=parts["vision"], text_config=parts["text"], **parts["joint"])
    return Workload(
        "clip_vit_l14", "picture", pictures, lambda device: build_on(device, transformers.CLIPModel, config), run
    )


def longclip(sizes: Sizes = PUBLISHED, sentences: int = 32) -> Workload:
    """LongCLIP's text side on sentences of the greatest length, as `models.text_encoder.LongClip` runs it."""
    fields = sizes["longclip_l"]["text"]

    @torch.no_grad()
    def run(model: Any) -> Tensor:
        words = _words(model, *[1] * (fields["max_position_embeddings"] - 1), fields["eos_token_id"])
        return model(input_ids=words.expand(sentences, -1)).text_embeds

    config, family = transformers.CLIPTextConfig(**fields), transformers.CLIPTextModelWithProjection
    return Workload("longclip_l", "sentence", sentences, lambda device: build_on(device, family, config), run)


def farl(sizes: Sizes = PUBLISHED, faces: int = 1) -> Workload:
    """FaRL's vision tower, as `models.farl.Farl` runs it."""
    fields = sizes["farl"]["vision"]

    @torch.no_grad()
    def run(model: Any) -> Tensor:
        return model(pixel_values=_inputs(model, faces, 3, fields["image_size"], fields["image_size"])).image_embeds

    config, family = transformers.CLIPVisionConfig(**fields), transformers.CLIPVisionModelWithProjection
    return Workload("farl", "face", faces, lambda device: build_on(device, family, config), run)


def grounding_dino(sizes: Sizes = PUBLISHED, width: int = 1333, height: int = 750) -> Workload:
    """Grounding DINO with the prompt "person." on a picture of 16 to 9, as `models.grounding_dino` runs it."""
    parts = sizes["grounding_dino"]

    @torch.no_grad()
    def run(model: Any) -> tuple[Tensor, Tensor]:
        words = _words(model, *(id % parts["text"]["vocab_size"] for id in (101, 2711, 1012, 102)))
        mask = torch.ones(1, height, width, dtype=torch.long, device=words.device)
        found = model(
            pixel_values=_inputs(model, 1, 3, height, width), pixel_mask=mask, input_ids=words,
            attention_mask=torch.ones_like(words), token_type_ids=torch.zeros_like(words),
        )  # fmt: skip
        return found.pred_boxes, found.logits

    def build(device: str) -> nn.Module:
        config = transformers.GroundingDinoConfig(
            backbone_config=transformers.SwinConfig(**parts["backbone"]),
            text_config=transformers.BertConfig(**parts["text"]),
            **parts["detector"],
        )
        return build_on(device, transformers.GroundingDinoForObjectDetection, config)

    return Workload("grounding_dino", "picture", 1, build, run)


def describe_sam2(sizes: Sizes = PUBLISHED) -> transformers.Sam2Config:
    """SAM 2's configuration."""
    parts = sizes["sam2"]
    vision = transformers.Sam2VisionConfig(
        backbone_config=transformers.Sam2HieraDetConfig(**parts["backbone"]), **parts["vision"]
    )
    return transformers.Sam2Config(
        vision_config=vision, prompt_encoder_config=parts["prompts"], mask_decoder_config=parts["masks"]
    )


def sam2(sizes: Sizes = PUBLISHED, boxes: int = 5) -> Workload:
    """SAM 2 for a picture with as many boxes as there may be persons, as `models.sam2.Sam2` runs it."""

    @torch.no_grad()
    def run(model: Any) -> Tensor:
        side = sizes["sam2"]["prompts"]["image_size"]
        return model(
            pixel_values=_inputs(model, 1, 3, side, side), input_boxes=_inputs(model, 1, boxes, 4).abs(),
            multimask_output=False,
        ).pred_masks  # fmt: skip

    config = describe_sam2(sizes)
    return Workload("sam2", "picture", 1, lambda device: build_on(device, transformers.Sam2Model, config), run)


def _build_deepseek(parts: dict[str, Any], device: str) -> nn.Module:
    config = transformers.DeepseekVLHybridConfig(
        text_config=parts["text"], vision_config=parts["vision"], high_res_vision_config=parts["fine_vision"],
        **parts["chat"],
    )  # fmt: skip
    return build_on(device, transformers.DeepseekVLHybridForConditionalGeneration, config, dtype=torch.bfloat16)


def _build_qwen(parts: dict[str, Any], device: str) -> nn.Module:
    config = transformers.Qwen3VLConfig(text_config=parts["text"], vision_config=parts["vision"], **parts["chat"])
    return build_on(device, transformers.Qwen3VLForConditionalGeneration, config, dtype=torch.bfloat16)


CHAT_MODELS = {"deepseek_vl_7b": _build_deepseek, "qwen3_vl_8b": _build_qwen}


def _see(name: str, model: nn.Module, parts: dict[str, Any], requests: int) -> tuple[int, dict[str, Tensor]]:
    """A picture of 896x512 for each request: how many positions it takes, and what the model is given of it."""
    vision = parts["vision"]
    if name == "deepseek_vl_7b":
        side, fine = vision["image_size"], parts["fine_vision"]["image_size"]
        seen = {
            "pixel_values": _inputs(model, requests, 3, side, side),
            "high_res_pixel_values": _inputs(model, requests, 3, fine, fine),
        }
        return (side // vision["patch_size"]) ** 2, seen
    rows, columns = 512 // vision["patch_size"], 896 // vision["patch_size"]
    grid = torch.tensor([[1, rows, columns]] * requests, device=next(model.parameters()).device)
    numbers = 3 * 2 * vision["patch_size"] ** 2  # a still picture counts as two moments
    return rows * columns // 4, {
        "pixel_values": _inputs(model, requests * rows * columns, numbers),
        "image_grid_thw": grid,
    }


def chat_prompt(name: str, sizes: Sizes = PUBLISHED, requests: int = 8, pictures: bool = True) -> Workload:
    """A chat model reads questions and keeps keys and values, as `models.vision_language` makes it."""
    parts = sizes[name]

    @torch.no_grad()
    def run(model: Any) -> Tensor:
        positions, seen = _see(name, model, parts, requests) if pictures else (0, {})
        words = _words(model, *[parts["chat"]["image_token_id"]] * positions, *[5] * PROMPT_WORDS)
        return model(
            input_ids=words.expand(requests, -1).contiguous(), **seen, **_places(name, model, requests, words.shape[1]),
            use_cache=True, logits_to_keep=1,
        ).logits  # fmt: skip

    what = "picture and question" if pictures else "question"
    return Workload(
        f"{name} {what}", "request", requests, lambda device: CHAT_MODELS[name](parts, device), run, network=name
    )


def chat_word(name: str, sizes: Sizes = PUBLISHED, requests: int = 8) -> Workload:
    """A chat model writes one word of each of its answers."""
    parts = sizes[name]

    @torch.no_grad()
    def run(model: Any) -> Tensor:
        if not hasattr(model, "read"):
            model.read = _fill_cache(model, parts["text"], requests)
        model.read.crop(-1) if model.read.get_seq_length() > PROMPT_WORDS else None
        words = _words(model, 5).expand(requests, -1)
        places = _places(name, model, requests, 1, start=PROMPT_WORDS)
        return model(input_ids=words, past_key_values=model.read, use_cache=True, **places).logits

    return Workload(
        f"{name} word", "word", requests, lambda device: CHAT_MODELS[name](parts, device), run, network=name
    )


def _places(name: str, model: nn.Module, requests: int, words: int, start: int = 0) -> dict[str, Tensor]:
    """Positions, which Qwen would find from the values of its inputs; as many, whichever they are."""
    if name != "qwen3_vl_8b":
        return {}
    device = next(model.parameters()).device
    return {"position_ids": torch.arange(start, start + words, device=device).expand(3, requests, -1)}


def _fill_cache(model: nn.Module, text: dict[str, Any], requests: int) -> DynamicCache:
    """Keys and values of a prompt that was read."""
    width = text.get("head_dim", text["hidden_size"] // text["num_attention_heads"])
    cache = DynamicCache()
    for layer in range(text["num_hidden_layers"]):
        shape = requests, text["num_key_value_heads"], PROMPT_WORDS, width
        cache.update(_inputs(model, *shape), _inputs(model, *shape), layer)
    return cache


def vae_encode(sizes: Sizes = PUBLISHED, height: int = 512, width: int = 896) -> Workload:
    """SDXL's VAE makes the latent of one picture, as `models.variational_latents` does."""

    @torch.no_grad()
    def run(model: Any) -> Tensor:
        return model.encode(_inputs(model, 1, 3, height, width)).latent_dist.mode()

    fields = sizes["sdxl"]["vae"]
    name = f"sdxl vae encoding {width}x{height}"
    return Workload(
        name, "picture", 1, lambda device: build_on(device, AutoencoderKL, **fields), run, network="sdxl vae"
    )


def vae_decode(sizes: Sizes = PUBLISHED, height: int = 512, width: int = 896) -> Workload:
    """SDXL's VAE makes a picture of its latent."""
    fields = sizes["sdxl"]["vae"]
    block = 2 ** (len(fields["block_out_channels"]) - 1)

    @torch.no_grad()
    def run(model: Any) -> Tensor:
        return model.decode(_inputs(model, 1, fields["latent_channels"], height // block, width // block)).sample

    name = f"sdxl vae decoding {width}x{height}"
    return Workload(
        name, "picture", 1, lambda device: build_on(device, AutoencoderKL, **fields), run, network="sdxl vae"
    )


def svd_unet(sizes: Sizes = PUBLISHED, frames: int = 25, height: int = 576, width: int = 1024) -> Workload:
    """SVD's UNet: one step of a clip, with and without its picture at once, for guidance."""
    fields = sizes["svd_xt"]["unet"]

    @torch.no_grad()
    def run(model: Any) -> Tensor:
        noisy = _inputs(model, 2, frames, fields["in_channels"], height // 8, width // 8)
        picture, facts = _inputs(model, 2, 1, fields["cross_attention_dim"]), _inputs(model, 2, 3)
        return model(noisy, torch.ones(2, device=noisy.device), picture, facts).sample

    def build(device: str) -> nn.Module:
        return build_on(device, UNetSpatioTemporalConditionModel, dtype=torch.float16, **fields)

    return Workload(f"svd_xt unet {frames} frames", "step", 1, build, run)


def svd_decode(sizes: Sizes = PUBLISHED, frames: int = 8, height: int = 576, width: int = 1024) -> Workload:
    """SVD's VAE makes some frames of a clip at once."""
    fields = sizes["svd_xt"]["vae"]

    @torch.no_grad()
    def run(model: Any) -> Tensor:
        latents = _inputs(model, frames, fields["latent_channels"], height // 8, width // 8)
        return model.decode(latents, num_frames=frames).sample

    def build(device: str) -> nn.Module:
        return build_on(device, AutoencoderKLTemporalDecoder, dtype=torch.float16, **fields)

    return Workload("svd_xt vae", "frame", frames, build, run)


def svd_image_encoder(sizes: Sizes = PUBLISHED) -> Workload:
    """SVD's image encoder on a clip's picture."""
    fields = sizes["svd_xt"]["image_encoder"]

    @torch.no_grad()
    def run(model: Any) -> Tensor:
        return model(pixel_values=_inputs(model, 1, 3, fields["image_size"], fields["image_size"])).image_embeds

    def build(device: str) -> nn.Module:
        config = transformers.CLIPVisionConfig(**fields)
        return build_on(device, transformers.CLIPVisionModelWithProjection, config, dtype=torch.float16)

    return Workload("svd_xt image encoder", "picture", 1, build, run)
