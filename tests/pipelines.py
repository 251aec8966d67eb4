"Tiny pipelines of diffusers, as their users set them up, and all that an edit must leave as it was."

import copy

import torch
from diffusers import (
    ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline, StableDiffusionPipeline, StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline, UNet2DConditionModel,
)
from peft import LoraConfig
from transformers import (
    CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection,
)

from tokenflow_nb.backbones.load import TOY_FOLDER


def toy_pipe(**parts):
    "The toy model as a pipeline."
    pipe = StableDiffusionPipeline.from_pretrained(TOY_FOLDER, torch_dtype=torch.float32, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def xl_pipe(**changes):
    "A random network with the form of Stable Diffusion XL: two text encoders, a pooled one, sizes, attention on two grids."
    toy, words = toy_pipe(), dict(vocab_size=1000, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16)
    words |= dict(hidden_size=32, intermediate_size=32, projection_dim=24, eos_token_id=toy.tokenizer.eos_token_id)
    words |= dict(vocab_size=toy.text_encoder.config.vocab_size, bos_token_id=toy.tokenizer.bos_token_id)
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32, 32), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, norm_num_groups=8,
        transformer_layers_per_block=(1, 1, 2), attention_head_dim=(2, 2, 4), cross_attention_dim=64, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=8 * 6 + 24,
    )
    parts = dict(
        vae=toy.vae, text_encoder=CLIPTextModel(CLIPTextConfig(**words)), text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**words)),
        tokenizer=toy.tokenizer, tokenizer_2=copy.deepcopy(toy.tokenizer), unet=unet,
        scheduler=DDIMScheduler.from_config(toy.scheduler.config, prediction_type="epsilon"),
    )
    pipe = StableDiffusionXLPipeline(**parts | changes)
    for part in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_controlnet(pipe):
    "The ControlNet form of a pipeline, with a random ControlNet."
    torch.manual_seed(2)
    controlnet = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16, 32)).eval()  # to a quarter, as the toy's VAE
    xl = isinstance(pipe, StableDiffusionXLPipeline)
    kind = StableDiffusionXLControlNetPipeline if xl else StableDiffusionControlNetPipeline
    extra = {} if xl else dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return kind(**{name: part for name, part in pipe.components.items() if name not in extra and part is not None}, controlnet=controlnet, **extra)


def add_lora(pipe, name, seed=0):
    "A random LoRA of rank 4 at all attentions, strong enough to be seen."
    torch.manual_seed(seed)
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), name)
    return pipe


def add_textual_inversion(pipe, token="<mine>", rows=2):
    "A word of the user's own, of several vectors."
    torch.manual_seed(3)
    pipe.load_textual_inversion({token: 0.1 * torch.randn(rows, pipe.text_encoder.config.hidden_size)}, token=token)
    return pipe


def add_ip_adapter(pipe, scale=1.0):
    "A random IP-Adapter with its picture encoder."
    torch.manual_seed(4)
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16, projection_dim=16)
    pipe.register_modules(image_encoder=CLIPVisionModelWithProjection(config).eval(), feature_extractor=CLIPImageProcessor(
        size=dict(shortest_edge=32), crop_size=dict(height=32, width=32)
    ))
    width, tokens = pipe.unet.config.cross_attention_dim, 4
    projection = {"proj.weight": torch.randn(tokens * width, 16) / 4, "proj.bias": torch.zeros(tokens * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    pipe.unet._load_ip_adapter_weights([dict(image_proj=projection, ip_adapter=_adapter(pipe.unet))], low_cpu_mem_usage=False)
    pipe.set_ip_adapter_scale(scale)
    return pipe


def _adapter(unet):
    "The weights of an adapter, numbered in the order in which diffusers reads them: that of `attn_processors`."
    found, number = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            shape = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape
            found |= {f"{number}.to_{part}_ip.weight": torch.randn(shape) / 4 for part in "kv"}
            number += 2
    return found


def state_of(pipe):
    "All of a pipeline that an edit may touch: weights with their strides, hooks, processors, switches, scheduler, attributes."
    found = {"pipe": sorted(vars(pipe)), "scheduler": {name: str(value) for name, value in vars(pipe.scheduler).items()}}
    for part, network in pipe.components.items():
        if not isinstance(network, torch.nn.Module):
            continue
        for name, module in network.named_modules():
            place = f"{part}.{name}"
            hooks = [_lasting(each) for each in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)]
            plain = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str | None)}
            plain.pop("_output_capturing_hooks_installed", None)
            found[place] = [type(module).__qualname__, hooks, plain, sorted(module._modules), id(getattr(module, "processor", None))]
            found[place] += [id(vars(module).get("_compiled_call_impl")), id(vars(module).get("forward"))]
            for key, value in (*module._parameters.items(), *module._buffers.items()):
                if value is not None:
                    content = "meta" if value.is_meta else value.detach().clone()
                    found[f"{place}.{key}"] = [value.dtype, value.device, value.stride(), value.requires_grad, content]
    return found


def _lasting(hooks):
    "The hooks of a module, without those that transformers hangs into a text encoder at its first call, whoever calls it."
    return [id(hook) for hook in hooks.values() if "output_capturing" not in getattr(hook, "__module__", "")]


def differences(before, after):
    "The names of what is not the same in two states."
    same = lambda one, other: torch.equal(one, other) if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) else one == other  # noqa: E731
    equal = lambda one, other: all(map(same, one, other)) if isinstance(one, list) and isinstance(other, list) else one == other  # noqa: E731
    return [name for name in before | after if not equal(before.get(name), after.get(name))]
