"""The configurations of the paper profile's networks as their makers publish them, as data.

Keys are names of the table of weights (`models.weights_table`); below each stands one configuration for each of its
networks. Fields that are left out are the library's defaults, and are those of the published file.

Sources: the `config.json` files of the repositories that are named at each entry, and the papers they belong to.
"""

from typing import Any

Sizes = dict[str, dict[str, dict[str, Any]]]

CLIP_TEXT = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "projection_dim": 768, "hidden_act": "quick_gelu",
    "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 0,
}  # fmt: skip

PUBLISHED: Sizes = {
    # openai/clip-vit-large-patch14
    "clip_vit_l14": {
        "vision": {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "image_size": 224, "patch_size": 14, "projection_dim": 768, "hidden_act": "quick_gelu",
        },
        "text": CLIP_TEXT,
        "joint": {"projection_dim": 768},
    },
    # BeichenZhang/LongCLIP-L: CLIP ViT-L/14's text side with 248 positions
    "longclip_l": {"text": CLIP_TEXT | {"max_position_embeddings": 248}},
    # IDEA-Research/grounding-dino-base: Swin-B of 384 pixels, BERT base
    "grounding_dino": {
        "backbone": {
            "embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12,
            "image_size": 384, "out_indices": [2, 3, 4],
        },
        "text": {
            "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
            "intermediate_size": 3072,
        },
        "detector": {"num_queries": 900, "encoder_layers": 6, "decoder_layers": 6, "d_model": 256},
    },
    # facebook/sam2.1-hiera-large
    "sam2": {
        "backbone": {
            "hidden_size": 144, "num_attention_heads": 2, "blocks_per_stage": [2, 6, 36, 4],
            "embed_dim_per_stage": [144, 288, 576, 1152], "num_attention_heads_per_stage": [2, 4, 8, 16],
            "window_size_per_stage": [8, 4, 16, 8], "global_attention_blocks": [23, 33, 43],
            "window_positional_embedding_background_size": [7, 7], "image_size": [1024, 1024],
        },
        "vision": {
            "backbone_channel_list": [1152, 576, 288, 144], "fpn_hidden_size": 256,
            "backbone_feature_sizes": [[256, 256], [128, 128], [64, 64]],
        },
        "prompts": {"hidden_size": 256, "image_size": 1024, "patch_size": 16},
        "masks": {"hidden_size": 256, "mlp_dim": 2048},
    },
    # FacePerceiver/FaRL: FaRL-Base-Patch16-LAIONFace20M-ep64
    "farl": {
        "vision": {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "image_size": 224, "patch_size": 16, "projection_dim": 512, "hidden_act": "quick_gelu",
        },
    },
    # deepseek-community/deepseek-vl-7b-chat: SigLIP-L at 384 pixels, SAM-B at 1024, DeepSeek LLM 7B
    "deepseek_vl_7b": {
        "text": {
            "model_type": "llama", "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 30, "num_attention_heads": 32, "num_key_value_heads": 32,
            "max_position_embeddings": 16384,
        },
        "vision": {
            "model_type": "siglip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
            "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 384, "patch_size": 16,
            "vision_use_head": False,
        },
        "fine_vision": {
            "model_type": "sam_vision_model", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
            "image_size": 1024, "patch_size": 16, "global_attn_indexes": [2, 5, 8, 11], "mlp_dim": 3072,
        },
        "chat": {"image_token_id": 100015, "tie_word_embeddings": False},
    },
    # Qwen/Qwen3-VL-8B-Instruct
    "qwen3_vl_8b": {
        "text": {
            "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        "vision": {
            "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16,
            "out_hidden_size": 4096, "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
        },
        "chat": {"image_token_id": 151655, "tie_word_embeddings": False},
    },
    # meta-llama/Llama-2-7b-hf
    "llama2_7b": {
        "trunk": {
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    # stabilityai/stable-diffusion-xl-base-1.0
    "sdxl": {
        "unet": {
            "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280),
            "layers_per_block": 2, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": {
            "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
            "sample_size": 1024, "scaling_factor": 0.13025,
        },
    },
    # stabilityai/stable-video-diffusion-img2vid-xt
    "svd_xt": {
        "unet": {
            "sample_size": 96, "in_channels": 8, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2, "num_attention_heads": (5, 10, 20, 20), "cross_attention_dim": 1024,
            "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 768, "num_frames": 25,
        },
        "vae": {
            "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 4, "sample_size": 768, "scaling_factor": 0.18215,
        },
        "image_encoder": {
            "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
            "image_size": 224, "patch_size": 14, "projection_dim": 1024, "hidden_act": "gelu",
        },
    },
}  # fmt: skip

_TINY_CLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16,
    "hidden_act": "quick_gelu",
}  # fmt: skip
_TINY_CLIP_TEXT = _TINY_CLIP | {
    "vocab_size": 99, "max_position_embeddings": 20, "bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 0,
}  # fmt: skip
_TINY_LLAMA = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip
_TINY_ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 10000.0}

TINY: Sizes = {
    "clip_vit_l14": {
        "vision": _TINY_CLIP | {"image_size": 28, "patch_size": 14}, "text": _TINY_CLIP_TEXT,
        "joint": {"projection_dim": 16},
    },
    "longclip_l": {"text": _TINY_CLIP_TEXT | {"max_position_embeddings": 40}},
    "grounding_dino": {
        "backbone": {
            "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4, "image_size": 64,
            "out_indices": [2, 3, 4],
        },
        "text": {
            "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 32,
        },
        "detector": {
            "num_queries": 20, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 256,
        },
    },
    "sam2": {
        "backbone": {
            "hidden_size": 16, "num_attention_heads": 1, "blocks_per_stage": [1, 1, 1, 1], "image_size": [64, 64],
            "embed_dim_per_stage": [16, 32, 64, 128], "num_attention_heads_per_stage": [1, 2, 4, 8],
            "window_size_per_stage": [4, 4, 4, 4], "global_attention_blocks": [],
            "window_positional_embedding_background_size": [4, 4],
        },
        "vision": {
            "backbone_channel_list": [128, 64, 32, 16], "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
        "prompts": {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
        "masks": {
            "hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "num_hidden_layers": 1,
            "iou_head_hidden_dim": 16,
        },
    },
    "farl": {"vision": _TINY_CLIP | {"image_size": 32, "patch_size": 16}},
    "deepseek_vl_7b": {
        "text": _TINY_LLAMA | {"model_type": "llama"},
        "vision": {
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 32, "patch_size": 16, "vision_use_head": False,
        },
        "fine_vision": {
            "model_type": "sam_vision_model", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 64, "patch_size": 16, "global_attn_indexes": [1], "mlp_dim": 32, "output_channels": 16,
            "window_size": 2,
        },
        "chat": {"image_token_id": 98, "tie_word_embeddings": False},
    },
    "qwen3_vl_8b": {
        "text": _TINY_LLAMA | {"head_dim": 8, "rope_parameters": _TINY_ROPE},
        "vision": {
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 64,
            "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [1],
        },
        "chat": {"image_token_id": 98, "tie_word_embeddings": False},
    },
    "llama2_7b": {"trunk": _TINY_LLAMA | {"num_key_value_heads": 4}},
    "sdxl": {
        "unet": {
            "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32),
            "layers_per_block": 1, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 24,
            "attention_head_dim": (2, 4), "transformer_layers_per_block": (1, 2), "norm_num_groups": 8,
            "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 68,
        },
        "vae": {
            "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        },
    },
    "svd_xt": {
        "unet": {
            "sample_size": 8, "in_channels": 8, "out_channels": 4, "block_out_channels": (32, 32, 32, 32),
            "layers_per_block": 1, "num_attention_heads": (1, 2, 2, 2), "cross_attention_dim": 16,
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24, "num_frames": 3,
        },
        "vae": {
            "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1, "latent_channels": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 4,
        },
        "image_encoder": _TINY_CLIP | {"image_size": 28, "patch_size": 14},
    },
}  # fmt: skip
"""The same architectures with as little in them as goes: to try on real tensors what runs on the large ones."""
