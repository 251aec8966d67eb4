"Tiny random pipelines of Stable Diffusion 1, 2 and XL, and the reverse of diffusers' conversion: one file with the original keys."

import re

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tokenflow_nb.backbones.load import TOY_FOLDER

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def tiny_vae(seed=5, **changes):
    torch.manual_seed(seed)
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
    return AutoencoderKL(**dict(block_out_channels=(32, 32, 64), latent_channels=4, layers_per_block=1) | kinds | changes).eval()


def tiny_text(width, layers=2, kind=CLIPTextModel, act="quick_gelu", **changes):
    sizes = dict(vocab_size=734, intermediate_size=2 * width, max_position_embeddings=16, bos_token_id=tiny_words().bos_token_id)
    sizes |= dict(eos_token_id=tiny_words().eos_token_id, num_attention_heads=max(1, width // 64), projection_dim=width)
    return kind(CLIPTextConfig(hidden_size=width, num_hidden_layers=layers, hidden_act=act, **sizes | changes)).eval()


def tiny_words(pads_with=None):
    "The toy's tokenizer. That of OpenCLIP fills up with «!»."
    return CLIPTokenizer.from_pretrained(TOY_FOLDER / "tokenizer", **(dict(pad_token=pads_with) if pads_with else {}))


def tiny_unet(cross, **changes):
    kinds = dict(down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"))
    sizes = dict(sample_size=16, block_out_channels=(32, 64, 128), layers_per_block=1, cross_attention_dim=cross)
    heads = 8 if cross == 768 else (1, 1, 2)
    return UNet2DConditionModel(**kinds | sizes | dict(attention_head_dim=heads) | changes).eval()


def sd1(seed=0, **changes):
    "The form of Stable Diffusion 1: text width 768, 8 heads, convolutions around the transformers."
    torch.manual_seed(seed)
    parts = dict(unet=tiny_unet(768), vae=tiny_vae(), text_encoder=tiny_text(768), tokenizer=tiny_words(), scheduler=DDIMScheduler(**BETAS))
    return StableDiffusionPipeline(**parts | changes, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def sd2(seed=0, **changes):
    "The form of Stable Diffusion 2: OpenCLIP, 64 channels a head, linear layers around the transformers, v-prediction."
    torch.manual_seed(seed)
    parts = dict(unet=tiny_unet(64, use_linear_projection=True), text_encoder=tiny_text(64, act="gelu"))
    parts |= dict(vae=tiny_vae(), tokenizer=tiny_words("!"), scheduler=DDIMScheduler(**BETAS, prediction_type="v_prediction"))
    return StableDiffusionPipeline(**parts | changes, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def xl(seed=0, **changes):
    "The form of Stable Diffusion XL: two text encoders, sizes, attention on the two lower grids, of several blocks."
    torch.manual_seed(seed)
    kinds = dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
    added = dict(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=8 * 6 + 48)
    second = tiny_text(128, kind=CLIPTextModelWithProjection, act="gelu", projection_dim=48)
    unet = tiny_unet(192, use_linear_projection=True, transformer_layers_per_block=(1, 1, 2), layers_per_block=2, **kinds | added)
    parts = dict(unet=unet, vae=tiny_vae(scaling_factor=0.13025, force_upcast=True), text_encoder=tiny_text(64), text_encoder_2=second)
    parts |= dict(tokenizer=tiny_words(), tokenizer_2=tiny_words("!"), scheduler=DDIMScheduler(**BETAS))
    return StableDiffusionXLPipeline(**parts | changes, add_watermarker=False)


def original(pipe, **extra):
    "The weights of a pipeline by their original keys."
    found = {f"model.diffusion_model.{key}": value for key, value in original_unet(pipe.unet).items()}
    found |= {f"first_stage_model.{key}": value for key, value in original_vae(pipe.vae).items()}
    if getattr(pipe, "text_encoder_2", None) is not None:
        found |= clip_keys(pipe.text_encoder, "conditioner.embedders.0.transformer.text_model.")
        found |= open_clip_keys(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    elif pipe.text_encoder.config.hidden_act == "gelu":
        found |= open_clip_keys(pipe.text_encoder, "cond_stage_model.model.", unused=True)
    else:
        found |= clip_keys(pipe.text_encoder, "cond_stage_model.transformer.text_model.")
    return {key: value.detach().clone().contiguous() for key, value in (found | extra).items()}


def save_original(pipe, path, metadata=None, **extra):
    "Writes a pipeline as one file with the original keys."
    save_file(original(pipe, **extra), path, metadata=dict(format="pt") | (metadata or {}))
    return path


_TOP = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}


def original_unet(unet):
    layers, found = unet.config.layers_per_block, {}
    for key, value in unet.state_dict().items():
        name, _, kind = key.rpartition(".")
        place = re.match(r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key)
        if not place:
            found[f"{_TOP[name]}.{kind}"] = value
            continue
        part, block, what, number, rest = place.groups()
        block, number = int(block or 0), int(number)
        if what == "resnets":
            first, _, last = rest.partition(".")
            rest = f"{_RESNET[first]}.{last}"
        if part == "mid_block":
            new = f"middle_block.{1 if what == 'attentions' else 2 * number}.{rest}"
        elif part == "down_blocks":
            row = 1 + block * (layers + 1) + (layers if what == "downsamplers" else number)
            new = f"input_blocks.{row}." + {"resnets": f"0.{rest}", "attentions": f"1.{rest}", "downsamplers": rest.replace("conv", "0.op")}[what]
        else:
            row = block * (layers + 1) + (layers if what == "upsamplers" else number)
            above = 2 if unet.config.up_block_types[block].startswith("CrossAttn") else 1
            new = f"output_blocks.{row}." + {"resnets": f"0.{rest}", "attentions": f"1.{rest}", "upsamplers": f"{above}.{rest}"}[what]
        found[new] = value
    return found


def original_vae(vae):
    last, found = len(vae.config.block_out_channels) - 1, {}
    for key, value in vae.state_dict().items():
        new = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        new = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", new)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets", lambda match: f"up.{last - int(match[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda match: f"up.{last - int(match[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", new)
        if "mid_block.attentions.0" in new:
            new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm").replace("to_out.0", "proj_out")
            new = re.sub(r"to_([qkv])", r"\1", new)
            value = value[:, :, None, None] if value.dim() == 2 else value
        found[new] = value
    return found


def clip_keys(encoder, prefix):
    return {prefix + key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}


_OPEN = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}


def open_clip_keys(encoder, prefix, unused=False):
    "As OpenCLIP has them. `unused`: with one more layer, which Stable Diffusion 2 does not read."
    state, found = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}, {}
    tops = {"embeddings.token_embedding.weight": "token_embedding.weight", "embeddings.position_embedding.weight": "positional_embedding"}
    for key, value in state.items():
        if layer := re.match(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", key):
            number, name, kind = layer.groups()
            if name == "self_attn.q_proj":
                joined = torch.cat([state[f"encoder.layers.{number}.self_attn.{each}_proj.{kind}"] for each in "qkv"])
                found[f"transformer.resblocks.{number}.attn.in_proj_{kind}"] = joined
            elif name in _OPEN:
                found[f"transformer.resblocks.{number}.{_OPEN[name]}.{kind}"] = value
        elif key.startswith("final_layer_norm"):
            found[key.replace("final_layer_norm", "ln_final")] = value
        elif key == "text_projection.weight":
            found["text_projection"] = value.T
        elif key in tops:
            found[tops[key]] = value
    if unused:
        count = encoder.config.num_hidden_layers
        above = {key: value for key, value in found.items() if f".resblocks.{count - 1}." in key}
        found |= {key.replace(f".{count - 1}.", f".{count}.", 1): torch.randn_like(value) for key, value in above.items()}
        found["text_projection"] = torch.randn(encoder.config.hidden_size, encoder.config.hidden_size)
    return {prefix + key: value for key, value in found.items()}
