"""Models as people have them: folders that are damaged or of other models, single files, objects.

Each is a `ModelError` of one line that names the part and what to do, or it loads what it says. Nothing that a folder brings along is run.
"""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from tokenflow_nb.backbones.load import TOY_FOLDER, load_model
from tokenflow_nb.backbones.parts import _convert
from tokenflow_nb.backbones.schedule import ModelError
from tokenflow_nb.measure.metrics import ClipJudge

UNET, VAE, TEXT = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
WEIGHTS = (UNET, VAE, TEXT)


def small_unet(**changes) -> UNet2DConditionModel:
    options = dict(sample_size=8, block_out_channels=(8, 8, 8, 8), norm_num_groups=4, cross_attention_dim=16, attention_head_dim=4)
    return UNet2DConditionModel(**options | changes)


def small_vae(**changes) -> AutoencoderKL:
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    return AutoencoderKL(**dict(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, layers_per_block=1) | kinds | changes)


def small_text(**changes) -> CLIPTextModel:
    sizes = dict(vocab_size=734, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16)
    return CLIPTextModel(CLIPTextConfig(**sizes | changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A whole model of a few thousand weights, as diffusers and transformers write it."
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "made"
    for name in ("tokenizer", "scheduler", "feature_extractor"):
        shutil.copytree(TOY_FOLDER / name, folder / name)
    shutil.copy(TOY_FOLDER / "model_index.json", folder)
    for name, part in (("unet", small_unet()), ("vae", small_vae()), ("text_encoder", small_text())):
        part.save_pretrained(folder / name)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "model"))


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def put(part: str, network):
    "A damage: another network in the place of a part."
    return lambda folder: (shutil.rmtree(folder / part), network().save_pretrained(folder / part))


def config(path: str, **changes):
    return lambda folder: edit_json(folder / path, **changes)


def write(path: str, content: str | bytes):
    return lambda folder: (folder / path).write_bytes(content.encode() if isinstance(content, str) else content)


def remove(*paths: str):
    def damage(folder: Path) -> None:
        for path in paths:
            shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()

    return damage


def cut(path: str, keep: float):
    return lambda folder: (folder / path).write_bytes((data := (folder / path).read_bytes())[: int(keep * len(data))])


def first_tensor(path: str, change):
    "A damage: another first tensor; None removes it."

    def damage(tensors: dict) -> None:
        name = sorted(tensors)[0]
        tensors[name] = change(tensors[name])
        if tensors[name] is None:
            del tensors[name]

    return lambda folder: edit_weights(folder / path, damage)


def pickled(path: str):
    "A damage: the weights as a pickle."

    def damage(folder: Path) -> None:
        name = "pytorch_model.bin" if path == TEXT else "diffusion_pytorch_model.bin"
        torch.save(load_file(folder / path), (folder / path).with_name(name))
        (folder / path).unlink()

    return damage


def vocabulary(words: dict, merges: str):
    "A damage: a tokenizer in its old form."

    def damage(folder: Path) -> None:
        (folder / "tokenizer" / "tokenizer.json").unlink()
        (folder / "tokenizer" / "vocab.json").write_text(json.dumps(words))
        (folder / "tokenizer" / "merges.txt").write_text(merges)

    return damage


def toy_words() -> dict:
    return json.loads((TOY_FOLDER / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]


SPECIAL = {"<|startoftext|>": 0, "<|endoftext|>": 1}
INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134\n"

DAMAGES = {  # what was done to the folder, and what the message must say
    "no index": (remove(INDEX), "model_index.json"),
    "index is empty": (write(INDEX, ""), "model_index.json is not JSON"),
    "index is cut": (cut(INDEX, 0.5), "model_index.json is not JSON"),
    "index is a list": (write(INDEX, "[]"), "model_index.json holds a list"),
    "index is binary": (write(INDEX, b"\xff\xfe\x00"), "model_index.json is not JSON"),
    "index is nested deep": (write(INDEX, "[" * 100_000), "model_index.json is not JSON"),
    "index without a unet": (config(INDEX, unet=[None, None]), "no unet"),
    "index with strange entries": (config(INDEX, vae={"a": 1}), "no vae"),
    **{f"no folder {part}": (remove(part), f"folder {part} is missing") for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")},
    **{f"no {part} config": (remove(f"{part}/config.json"), f"{part}/config.json is missing") for part in ("unet", "vae", "text_encoder")},
    **{f"{part} config is a list": (write(f"{part}/config.json", "[1]"), f"{part}/config.json holds a list") for part in ("unet", "vae", "text_encoder")},
    "config of nonsense": (config("unet/config.json", down_block_types=5), "unet"),
    "config of other blocks": (config("unet/config.json", block_out_channels=[8, 8, 16, 8]), "unet.*shape"),
    "config of a text encoder with other sizes": (config("text_encoder/config.json", intermediate_size=32), "text_encoder: .*another shape.*fc1"),
    "no scheduler config": (remove(SCHEDULER), "scheduler_config.json is missing"),
    **{f"no weights {path}": (remove(path), f"{Path(path).parent} has no weights, {Path(path).name}") for path in WEIGHTS},
    **{f"pickle {path}": (pickled(path), rf"{Path(path).parent} has only pickles \(.*\.bin\).*save_pretrained") for path in WEIGHTS},
    **{f"cut {path}": (cut(path, 0.9), f"{path} is damaged or was not copied to its end") for path in WEIGHTS},
    **{f"empty {path}": (write(path, ""), f"{path} is damaged") for path in WEIGHTS},
    **{f"LFS {path}": (write(path, LFS), f"{path} is a pointer of Git LFS.*git lfs pull") for path in WEIGHTS},
    **{f"missing key {path}": (first_tensor(path, lambda t: None), f"{Path(path).parent}: 1 of its weights are missing") for path in WEIGHTS},
    **{f"other shape {path}": (first_tensor(path, lambda t: torch.zeros(7)), f"{Path(path).parent}: .*shape") for path in WEIGHTS},
    **{f"NaN {path}": (first_tensor(path, lambda t: t * float("nan")), f"{Path(path).parent}: weights of .* are NaN") for path in WEIGHTS},
    **{f"one infinity {path}": (first_tensor(path, lambda t: t.index_fill(0, torch.tensor([0]), float("inf"))), f"{Path(path).parent}: weights of") for path in WEIGHTS},
    **{f"unknown key {path}": (lambda folder, path=path: edit_weights(folder / path, lambda t: t.update(extra=torch.zeros(2))), "1 of its weights are unknown to config.json .extra.") for path in WEIGHTS},
    "quantised": (config("unet/config.json", quantization_config=dict(load_in_4bit=True)), "unet is quantised"),
    "tokenizer without vocabulary": (remove("tokenizer/tokenizer.json"), "tokenizer has no vocabulary"),
    "tokenizer of an empty object": (write("tokenizer/tokenizer.json", "{}"), "tokenizer cannot be read"),
    "tokenizer without words": (vocabulary(SPECIAL, "#version: 0.2\n"), "tokenizer knows no words"),
    "tokenizer without merges": (vocabulary(toy_words(), "#version: 0.2\n"), "tokenizer knows no words"),
    "tokenizer with an empty vocabulary": (vocabulary({}, "#version: 0.2\n"), "tokenizer"),
    "tokenizer of another model": (put("text_encoder", lambda: small_text(vocab_size=500)), "tokenizer has 734 words, the text encoder 500"),
    "text encoder of another model": (put("text_encoder", lambda: small_text(vocab_size=2000)), "tokenizer has 734 words, the text encoder 2000"),
    "text encoder of another width": (put("text_encoder", lambda: small_text(hidden_size=32)), "text_encoder has hidden_size=32, unet cross_attention_dim=16"),
    "text encoder of another kind": (config("text_encoder/config.json", model_type="t5"), "text_encoder is a t5 model"),
    "VAE of 16 channels": (put("vae", lambda: small_vae(latent_channels=16)), "vae has latent_channels=16, unet in_channels=4"),
    "VAE of another kind": (config("vae/config.json", _class_name="AutoencoderTiny"), "vae is a AutoencoderTiny"),
    "VAE of another family": (config("vae/config.json", shift_factor=0.1159), "vae is that of another family .shift_factor"),
    "VAE of depth": (put("vae", lambda: small_vae(in_channels=6, out_channels=6)), "vae is not one of RGB"),
    "inpainting": (put("unet", lambda: small_unet(in_channels=9)), "unet is that of an inpainting model"),
    "pix2pix": (put("unet", lambda: small_unet(in_channels=8)), "unet is that of an InstructPix2Pix model"),
    "upscaler": (put("unet", lambda: small_unet(in_channels=7, num_class_embeds=10)), "unet is that of an upscaler"),
    "depth": (put("unet", lambda: small_unet(in_channels=5)), "unet is that of a depth"),
    "class embeddings": (put("unet", lambda: small_unet(num_class_embeds=10)), "unet wants more .*num_class_embeds=10"),
    "cross attention only": (put("unet", lambda: small_unet(only_cross_attention=True)), "unet wants more .*only_cross_attention"),
    "no attention in the decoder": (
        put("unet", lambda: small_unet(up_block_types=("UpBlock2D",) * 4)),
        "unet has no self-attention in its decoder",
    ),
    "UNet of SDXL": (
        put("unet", lambda: small_unet(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64)),
        "unet is that of Stable Diffusion XL",
    ),
    "UNet of videos": (config("unet/config.json", _class_name="UNet3DConditionModel"), "unet is a UNet3DConditionModel"),
    "pipeline SDXL": (config(INDEX, _class_name="StableDiffusionXLPipeline", text_encoder_2=["transformers", "CLIPTextModelWithProjection"]), "folder tokenizer_2 is missing"),
    "pipeline SDXL without its second encoder": (config(INDEX, _class_name="StableDiffusionXLPipeline"), "folder tokenizer_2 is missing"),
    "two text encoders": (config(INDEX, text_encoder_2=["transformers", "CLIPTextModelWithProjection"]), "folder tokenizer_2 is missing"),
    "pipeline SD3": (config(INDEX, _class_name="StableDiffusion3Pipeline"), "it is Stable Diffusion 3"),
    "pipeline FLUX": (config(INDEX, _class_name="FluxPipeline"), "it is FLUX"),
    "pipeline PixArt": (config(INDEX, _class_name="PixArtAlphaPipeline"), "it is PixArt"),
    "pipeline of videos": (config(INDEX, _class_name="CogVideoXPipeline"), "it is a video model"),
    "pipeline without a UNet": (config(INDEX, _class_name="AuraFlowPipeline", unet=[None, None]), "no unet .AuraFlowPipeline"),
    "pipeline of its own code": (config(INDEX, _class_name=["pipeline", "Mine"]), "names a pipeline of its own"),
    "part of its own code": (config(INDEX, unet=["my_unet", "UNet2DConditionModel"]), "unet is a UNet2DConditionModel of 'my_unet'"),
    "scheduler of flow": (config(SCHEDULER, _class_name="FlowMatchEulerDiscreteScheduler"), "scheduler is a FlowMatchEulerDiscreteScheduler"),
    "scheduler of unknown betas": (config(SCHEDULER, beta_schedule="cubic"), "scheduler_config.json cannot be used .cubic"),
    "scheduler of wrong betas": (config(SCHEDULER, beta_end=5.0), "scheduler: no falling noise levels come of .*beta_end=5.0"),
    "scheduler of text betas": (config(SCHEDULER, beta_start="small"), "scheduler_config.json cannot be used"),
    "scheduler of few trained betas": (config(SCHEDULER, trained_betas=[0.1, 0.2]), "scheduler: .*trained_betas"),
    "scheduler of another length": (config(SCHEDULER, num_train_timesteps=0), "scheduler"),
    "scheduler of an unknown prediction": (config(SCHEDULER, prediction_type="x0"), "prediction_type='x0'"),
    "scheduler of an unknown spacing": (config(SCHEDULER, timestep_spacing="random"), "timestep_spacing='random'"),
    "noise predicted where all is noise": (
        config(SCHEDULER, prediction_type="epsilon", rescale_betas_zero_snr=True),
        "prediction_type='epsilon'.*rescale_betas_zero_snr=True.*v_prediction",
    ),
}


def refusal(model, **options) -> str:
    "The one line of the refusal, which tells nobody with a folder about the network."
    with pytest.raises(ModelError) as caught:
        load_model(model, **dict(device="cpu") | options)
    said = str(caught.value)
    assert "\n" not in said and 40 < len(said) < 700, said
    if isinstance(model, str | Path) and os.path.exists(model):
        assert not re.search("network|hub at|HF_HUB|cache|log in", said), said
    return said


@pytest.mark.parametrize("name", DAMAGES)
def test_a_folder_that_cannot_serve_says_which_part_and_what_to_do(folder, name):
    damage, words = DAMAGES[name]
    damage(folder)
    said = refusal(folder)
    assert re.search(words, said), said
    assert f"{str(folder)!r} could not be loaded" in said and re.search(": (download|copy|give|take|set|convert|run|put|leave|the parts)|: they|is supported|not supported", said), said


def works(model, **options) -> None:
    loaded = load_model(model, **dict(device="cpu") | options)
    latents = loaded.encode(np.full((1, 16, 16, 3), 90, np.uint8))
    assert loaded.predict(latents, 5, loaded.embed("a gold star")).noise.isfinite().all() and loaded.decode(latents).shape == (1, 16, 16, 3)


def half_files(folder: Path, keep: tuple[str, ...] = ()) -> None:
    for path in WEIGHTS:
        tensors = {name: tensor.half() for name, tensor in load_file(folder / path).items()}
        save_file(tensors, (folder / path).with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        if path not in keep:
            (folder / path).unlink()


def old_names(folder: Path) -> None:
    "The VAE's attention as the published Stable Diffusion has it."
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: dict) -> None:
        for name in [name for name in tensors if ".attentions.0.to_" in name]:
            tensors[re.sub(r"to_(out\.0|[qkv])", lambda found: new[found[0]], name)] = tensors.pop(name)

    edit_weights(folder / VAE, rename)


def own_code(folder: Path) -> None:
    "Code in every place where a library might run it."
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        for name in ("evil.py", "pipeline.py", "modeling.py", "unet.py", "__init__.py"):
            (place / name).write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    for path in ("unet/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json", INDEX):
        edit_json(folder / path, auto_map={"AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}, custom_pipeline="pipeline", trust_remote_code=True)


def links(folder: Path) -> None:
    "As the hub's cache has it: each file a link to a blob."
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))


SERVE = {
    "as it is": lambda folder: None,
    "half precision only": half_files,
    "both, and one of them once": lambda folder: half_files(folder, keep=(VAE,)),
    "another variant only": lambda folder: (folder / UNET).rename((folder / UNET).with_suffix(".non_ema.safetensors")),
    "pickles beside": lambda folder: (folder / UNET).with_suffix(".bin").write_bytes(b"no pickle"),
    "several files": lambda folder: (
        small_unet().save_pretrained(folder / "unet", max_shard_size="40KB"),
        (folder / UNET).unlink(),
    ),
    "old names": old_names,
    "own code": own_code,
    "links": links,
    "no safety checker's folder": config(INDEX, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"], requires_safety_checker=True),
    "an index of other tasks": config(INDEX, _class_name="StableDiffusionImg2ImgPipeline"),
    "an index without classes": write(INDEX, "{}"),
    "scheduler PNDM": config(SCHEDULER, _class_name="PNDMScheduler", skip_prk_steps=True),
    "tokenizer without its config": remove("tokenizer/tokenizer_config.json"),
    "another layer count": put("unet", lambda: small_unet(layers_per_block=1)),
}


@pytest.mark.parametrize("name", SERVE)
@pytest.mark.filterwarnings("error::UserWarning")
def test_a_folder_that_can_serve_loads(folder, name):
    SERVE[name](folder)
    works(folder)
    assert not (folder / "ran").exists()


def test_the_variant_follows_the_precision(folder):
    half_files(folder, keep=WEIGHTS)
    for path in WEIGHTS:
        write(path, "damaged")(folder)
    assert load_model(folder, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    assert "is damaged" in refusal(folder)


def test_a_folder_of_half_precision_computes_what_the_full_one_does(made, folder):
    half_files(folder)
    full, half = load_model(made, device="cpu"), load_model(folder, device="cpu")
    assert half.dtype == torch.float32 and torch.allclose(full.embed("a star").states, half.embed("a star").states, atol=1e-2)


def test_a_text_encoder_told_to_skip_layers_says_so(folder):
    edit_json(folder / "text_encoder" / "config.json", num_hidden_layers=1)
    with pytest.warns(UserWarning, match="text_encoder: config.json asks for 1 layers, the weights have more"):
        works(folder)


def test_weights_too_large_for_half_precision_name_the_remedy_and_it_helps(folder):
    first_tensor(VAE, lambda tensor: tensor.index_fill(0, torch.tensor([0]), 1e6))(folder)
    assert re.search("vae: weights of .* are NaN or infinite.*dtype=torch.float32", refusal(folder, dtype="float16"))
    load_model(folder, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(("path", "kind"), [(UNET, UNet2DConditionModel), (VAE, AutoencoderKL), (TEXT, CLIPTextModel)])
def test_the_remedy_for_pickles_helps(folder, path, kind):
    pickled(path)(folder)
    part = str(Path(path).parent)
    assert (remedy := _convert(part)) and remedy in refusal(folder)
    code = re.search(rf"{kind.__name__}\.from_pretrained.*\(path\)", remedy)[0]
    exec(code, {kind.__name__: kind, "path": folder / part})
    works(folder)


# ---- other ways to name a model


def test_a_path_is_read_as_a_person_writes_it(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder.parent)
    spaced = folder.rename(folder.parent / "my model's folder")
    names = ("~/my model's folder", "my model's folder", f'"{spaced}"', f"  '{spaced}'\n", f"{spaced}/model_index.json", spaced, f"{spaced}/", np.str_(spaced))
    for name in names:
        load_model(name, device="cpu")
    (folder.parent / "owner").mkdir()
    spaced.rename(folder.parent / "owner" / "name")
    load_model("owner/name", device="cpu")  # like an id of the hub, and a folder


FILES = {
    "model.ckpt": (b"\x80\x02", "pickles.*never read"),
    "model.pt": (b"PK", "pickles.*never read"),
    "film.mp4": (b"", "not a model"),
    "unet.safetensors": (["model.diffusion_model.input_blocks.0.0.weight"], "without a text encoder.*give the whole checkpoint"),
    "other.safetensors": (["model.diffusion_model.x"], "of another family"),
    "flux.safetensors": (["double_blocks.0.img_attn.w"], "FLUX"),
    "lora.safetensors": (["lora_unet_down.lora_up.weight"], "a LoRA"),
    "part.safetensors": (["decoder.conv_out.weight"], "a part of a model"),
    "broken.safetensors": (b"123", "broken.safetensors is damaged"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_single_file_is_named_for_what_it_is(tmp_path, name):
    content, words = FILES[name]
    if isinstance(content, list):
        save_file({key: torch.zeros(1) for key in content}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    assert re.search(words, said := refusal(tmp_path / name)), said


def test_folders_around_and_inside_a_model_point_to_it(folder, tmp_path):
    assert f"give {str(folder)!r}" in refusal(tmp_path)
    assert "single part (unet)" in refusal(folder / "unet")
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0a1b"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    assert f"give {str(snapshot)!r}" in refusal(tmp_path / "models--owner--name")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "model.safetensors").write_bytes(b"")
    assert "of single files (model.safetensors)" in refusal(tmp_path / "files")


@pytest.mark.parametrize("model", [None, 5, True, b"toy", ["toy"], {"unet": 1}, np.zeros(3), object()], ids=lambda value: type(value).__name__)
def test_what_is_no_name_is_said_to_be_none(model):
    assert "give an alias (toy" in refusal(model)


@pytest.mark.parametrize("name", ["", " ", "toyy", "no/such/folder", "./nothing", "~/nothing", "/nothing", "\0", "x" * 5000, "owner/na me", "-a/b", "~nobody/x"])
def test_a_name_of_nothing_says_what_there_is(name):
    with pytest.raises(ModelError, match=r"no alias and no folder.*Aliases are toy, sd1\.5") as caught:
        load_model(name, device="cpu")
    assert len(str(caught.value).splitlines()) == 1


def test_an_address_is_not_an_id_and_the_id_is_given():
    assert "give the hub id, 'owner/name'" in refusal("https://huggingface.co/owner/name/tree/main")


def test_a_pipeline_object_is_a_model_and_a_part_of_it_is_none(made, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(made)
    pipeline.save_pretrained(tmp_path / "written")
    works(pipeline)
    works(tmp_path / "written")
    assert "UNet2DConditionModel, a part of a model" in refusal(pipeline.unet)


def test_devices_and_precisions_that_are_not_there(made):
    assert "device='tpu' is not here" in refusal(made, device="tpu") and "device='meta'" in refusal(made, device="meta")
    assert "device='cuda:99' is not here" in refusal(made, device="cuda:99")
    for wrong in ("int8", torch.int8, np.int64, 16, "float17", torch.float8_e4m3fn):
        assert "dtype=" in (said := refusal(made, dtype=wrong)) and "torch.float16" in said
    for right in ("float16", "torch.float16", "fp16", "half", np.float16, np.dtype("float16"), torch.float16):
        assert load_model(made, device="cpu", dtype=right).dtype == torch.float16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(made):
    assert "device='cuda' is not here" in refusal(made, device="cuda")


# ---- the judge


JUDGE = {
    "no weights": (remove("model.safetensors"), "has no weights"),
    "a pickle": (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "only pickles"),
    "a missing key": (first_tensor("model.safetensors", lambda t: None), "1 of its weights are missing"),
    "NaN": (first_tensor("model.safetensors", lambda t: t * float("nan")), "are NaN or infinite"),
    "cut": (cut("model.safetensors", 0.5), "is damaged"),
    "no config": (remove("config.json"), "config.json is missing"),
    "no tokenizer": (remove("tokenizer.json"), "has no vocabulary"),
    "no preprocessor": (remove("preprocessor_config.json"), "preprocessor_config.json is missing"),
    "a bad preprocessor": (write("preprocessor_config.json", "{"), "preprocessor_config.json is not JSON"),
    "another model": (config("config.json", model_type="siglip"), "is a siglip model, not CLIP"),
}


@pytest.mark.parametrize("name", JUDGE)
def test_a_judge_that_cannot_serve_says_why(tmp_path, name):
    damage, words = JUDGE[name]
    damage(folder := Path(shutil.copytree(TOY_FOLDER / "clip_model", tmp_path / "judge")))
    with pytest.raises(ModelError, match=words) as caught:
        ClipJudge.load(folder)
    assert len(str(caught.value).splitlines()) == 1 and f"checkpoint={str(folder)!r} could not be loaded" in str(caught.value)


def test_a_judge_whose_towers_overflow_gives_no_figure(tmp_path):
    judge = ClipJudge.load("toy")
    with torch.no_grad():
        judge.model.vision_model.embeddings.class_embedding.fill_(float("nan"))
        judge.model.text_projection.weight.fill_(float("inf"))
    with pytest.raises(ModelError, match="image tower"):
        judge.pictures(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(ModelError, match="text tower"):
        judge.sentences(["a star"])
