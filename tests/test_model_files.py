"""What people have on their disks: one file, one variant, XL, a LoRA, another VAE.

Each file of the original form is written here from a tiny random pipeline, by the reverse of diffusers' conversion.
"""

import importlib.util
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import constants
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from original_form import original, original_vae, save_original, sd1, sd2, tiny_text, tiny_unet, tiny_vae, xl
from pipelines import add_lora, toy_pipe
from tokenflow_nb.backbones import parts, single_file
from tokenflow_nb.backbones.added import AddedError
from tokenflow_nb.backbones.load import MODELS, TOY_FOLDER, load_model, shared_model
from tokenflow_nb.backbones.schedule import ModelError
from tokenflow_nb.backbones.single_file import MARK_EPSILON, read_file
from tokenflow_nb.cli.command import main
from tokenflow_nb.edit import edit_video
from tokenflow_nb.panels.state import EditState
from tokenflow_nb.store import Store
from tokenflow_nb.toy.world import Scene

WORDS = TOY_FOLDER / "tokenizer"
FORMS = {"sd1": sd1, "sd2": sd2, "xl": xl}
CLIP = Scene.random(5).render(frames=3, size=64)
FEW = dict(num_inference_steps=2, keyframe_interval=2, progress=False, size=(64, 64))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "One file of each form, which says what its network predicts, and the pipelines that they were made of."
    folder, found = tmp_path_factory.mktemp("files"), {}
    for name, make in FORMS.items():
        said = {"modelspec.prediction_type": "v" if name == "sd2" else "epsilon", "modelspec.resolution": "64x64"}
        found[name] = make(), save_original(pipe := make(), folder / f"{name}.safetensors", said)
        pipe.save_pretrained(folder / name)
    return found


@pytest.fixture(scope="module")
def detail(tmp_path_factory):
    "A LoRA of the toy, saved by diffusers."
    return save_lora(toy_pipe(), tmp_path_factory.mktemp("loras") / "detail.safetensors")


def save_lora(pipe, path, seed=1):
    add_lora(pipe, "made", seed)
    pipe.save_lora_weights(path.parent, unet_lora_layers=get_peft_model_state_dict(pipe.unet, adapter_name="made"), weight_name=path.name)
    return path


def noise_of(model, side=16):
    "What a network predicts."
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
    return model.predict(latents, 500, model.embed("a gold star on grass")).noise


def refusal(*what, kind=ModelError, **options):
    "The one line of a refusal."
    with pytest.raises(kind) as caught:
        load_model(*what, **dict(device="cpu") | options)
    said = str(caught.value)
    assert "\n" not in said and 30 < len(said) < 900, said
    return said


def no_weights(monkeypatch):
    "From here on, reading weights fails the test."
    for kind in (AutoencoderKL, UNet2DConditionModel):
        for how in ("from_pretrained", "from_single_file"):
            monkeypatch.setattr(kind, how, lambda *_, **__: pytest.fail("weights were read"))
    monkeypatch.setattr(single_file, "_converted", lambda *_, **__: pytest.fail("weights were read"))


# ---- one file


@pytest.mark.parametrize("form", FORMS)
def test_every_weight_and_setting_comes_back(files, form):
    pipe, path = files[form]
    configs = single_file.file_configs(path)
    found = read_file(path, configs, torch.float32, WORDS)
    for part in [part for part in configs if part != "scheduler"]:
        theirs, ours = getattr(pipe, part), found[part]
        assert theirs.state_dict().keys() == ours.state_dict().keys()
        assert all(torch.equal(value, ours.state_dict()[key]) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("error::UserWarning")
def test_a_file_computes_what_the_pipeline_does_that_it_was_made_of(files, form):
    pipe, path = files[form]
    ours, theirs = load_model(path, device="cpu", tokenizer=WORDS), load_model(pipe)
    assert torch.allclose(noise_of(ours), noise_of(theirs), atol=1e-5) and ours.size == 64
    assert torch.equal(ours.embed("a star").states, theirs.embed("a star").states)
    frames = CLIP.frames[:1]
    assert torch.allclose(ours.encode(frames), theirs.encode(frames), atol=1e-5)
    assert ours.schedule.prediction_type == theirs.schedule.prediction_type == ("v_prediction" if form == "sd2" else "epsilon")
    assert ours.guidance_scale == (5.0 if form == "xl" else 7.5)


@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_each_time_the_same_model(files, form, tmp_path):
    pipe, path = files[form]
    other = save_original(FORMS[form](seed=1), tmp_path / "other.safetensors", {"modelspec.prediction_type": "epsilon"})
    one, again, another = (load_model(each, device="cpu", tokenizer=WORDS) for each in (path, path, other))
    assert one.digest == again.digest != another.digest and torch.equal(noise_of(one), noise_of(again))


def test_a_file_edits_a_clip_and_its_name_is_recorded(files, tmp_path):
    _, path = files["sd1"]
    result = edit_video(CLIP, "a gold star", model=path, tokenizer=WORDS, out=tmp_path / "out", store=Store(tmp_path / "store"), **FEW)
    assert len(result.edited) == 3 and json.loads((tmp_path / "out" / "run.json").read_text())["model"]["name"] == str(path)


def test_half_precision_and_ema_weights_beside(tmp_path):
    pipe = sd1()
    weights = {key: value.half() for key, value in original(pipe).items()}
    weights |= {f"model_ema.{number}": torch.zeros(1) for number in range(101)} | {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(16)[None]}
    save_file(weights, tmp_path / "half.safetensors")
    model = load_model(tmp_path / "half.safetensors", device="cpu", tokenizer=WORDS, dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and noise_of(load_model(tmp_path / "half.safetensors", device="cpu", tokenizer=WORDS)).isfinite().all()


PREDICTIONS = {  # form, metadata, more keys: prediction, zero terminal SNR
    "said": ("sd1", {"modelspec.prediction_type": "v"}, {}, "v_prediction", False),
    "a key": ("xl", {}, {"v_pred": torch.zeros(0)}, "v_prediction", False),
    "both keys": ("xl", {}, {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, "v_prediction", True),
    "nothing": ("xl", {}, {}, "epsilon", False),
}


@pytest.mark.parametrize("case", PREDICTIONS)
def test_what_the_network_predicts_is_in_metadata_or_keys(case, tmp_path):
    form, metadata, keys, kind, zero = PREDICTIONS[case]
    path = save_original(FORMS[form](), tmp_path / "a.safetensors", metadata, **keys)
    schedule = load_model(path, device="cpu", tokenizer=WORDS).schedule
    assert schedule.prediction_type == kind and schedule.config["rescale_betas_zero_snr"] is zero


def test_a_file_of_sd2_that_says_nothing_is_warned_of_and_the_remedy_helps(tmp_path):
    path = save_original(sd2(), tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="v_prediction is taken.*save_file") as caught:
        assert load_model(path, device="cpu", tokenizer=WORDS).schedule.prediction_type == "v_prediction"
    assert MARK_EPSILON in str(caught[0].message)
    exec(MARK_EPSILON, dict(safetensors=safetensors, load_file=load_file, path=path, target=(target := tmp_path / "b.safetensors")))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert load_model(target, device="cpu", tokenizer=WORDS).schedule.prediction_type == "epsilon"


def cache_words(monkeypatch, folder):
    "CLIP's tokenizer in the hub's cache, as the hub lays it there; here it is the toy's."
    place = folder / "models--openai--clip-vit-large-patch14"
    shutil.copytree(WORDS, place / "snapshots" / "0a1b")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0a1b")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))


def test_words_come_from_the_cache_of_the_hub(files, tmp_path, monkeypatch):
    _, path = files["sd1"]
    cache_words(monkeypatch, tmp_path / "hub")
    assert torch.equal(noise_of(load_model(path, device="cpu")), noise_of(load_model(path, device="cpu", tokenizer=WORDS)))


def test_without_words_and_network_the_remedy_is_named_and_helps(files, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = refusal(files["sd1"][1])
    assert "openai/clip-vit-large-patch14" in said and "give tokenizer=, the folder tokenizer of any Stable Diffusion model" in said
    load_model(files["sd1"][1], device="cpu", tokenizer=files["sd1"][1].with_suffix("") / "tokenizer")
    load_model(files["sd1"][1], device="cpu", tokenizer=files["sd1"][1].with_suffix(""))
    assert "only a single file needs one" in refusal("toy", tokenizer=WORDS)
    assert "is no folder" in refusal(files["sd1"][1], tokenizer=tmp_path / "no")


def test_words_of_another_model_are_refused(tmp_path):
    path = save_original(sd1(text_encoder=tiny_text(768, vocab_size=2000)), tmp_path / "a.safetensors")
    assert "tokenizer has 734 words, the text encoder 2000" in refusal(path, tokenizer=WORDS)


def without(prefix):
    return {key: value for key, value in original(sd1()).items() if not key.startswith(prefix)}


def smaller():
    "A UNet with a layer of the decoder left out, as distilled ones have it."
    return {key: value for key, value in original(sd1()).items() if ".output_blocks.2.1.transformer" not in key}


NOT_A_MODEL = {  # weights, and what is said of them
    "inpainting": (lambda: original(sd1(unet=tiny_unet(768, in_channels=9))), "an inpainting model"),
    "pix2pix": (lambda: original(sd1(unet=tiny_unet(768, in_channels=8))), "InstructPix2Pix"),
    "controlnet": (lambda: {"control_model.time_embed.0.weight": torch.zeros(1)}, "a ControlNet"),
    "sd3": (lambda: {"model.diffusion_model.joint_blocks.0.w": torch.zeros(1)}, "Stable Diffusion 3"),
    "flux": (lambda: {"model.diffusion_model.double_blocks.0.w": torch.zeros(1)}, "FLUX"),
    "lora": (lambda: {"lora_unet_a.lora_down.weight": torch.zeros(1, 1)}, "a LoRA.*as lora="),
    "a VAE": (lambda: original_vae(tiny_vae()), "a VAE alone.*as vae="),
    "no VAE": (lambda: without("first_stage_model."), "without a VAE: give one as vae="),
    "no text encoder": (lambda: without("cond_stage_model."), "without a text encoder"),
    "a missing block": (lambda: without("model.diffusion_model.output_blocks.3"), "made smaller|not one of"),
    "a missing weight": (lambda: without("model.diffusion_model.time_embed.0"), "do not make a whole model"),
    "smaller": (smaller, "made smaller.*diffusers' form"),
    "NaN": (lambda: without("cond_stage_model.transformer.text_model.final_layer_norm.bias") | {"cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.full((768,), float("nan"))}, "NaN or infinite"),
    "VAE of 16 channels": (lambda: original(sd1(vae=tiny_vae(latent_channels=16))), "vae has latent_channels=16"),
}


@pytest.mark.parametrize("case", NOT_A_MODEL)
def test_a_file_that_cannot_serve_is_named_for_what_it_is(case, tmp_path, monkeypatch):
    make, words = NOT_A_MODEL[case]
    save_file(make(), tmp_path / "a.safetensors")
    if case not in ("a missing weight", "NaN"):
        no_weights(monkeypatch)
    assert re.search(words, said := refusal(tmp_path / "a.safetensors", tokenizer=WORDS)), said


def test_what_a_file_says_it_predicts_must_be_known(tmp_path):
    path = save_original(sd1(), tmp_path / "a.safetensors", {"modelspec.prediction_type": "flow"})
    assert "modelspec.prediction_type='flow'" in refusal(path, tokenizer=WORDS)


@pytest.mark.parametrize("nested", [True, False])
def test_a_pickle_is_refused_and_the_conversion_that_is_named_works(nested, tmp_path, files):
    pipe, path = files["sd1"]
    weights = original(pipe)
    torch.save(dict(state_dict=weights, global_step=7) if nested else weights, tmp_path / "a.ckpt")
    said = refusal(tmp_path / "a.ckpt", tokenizer=WORDS)
    assert "pickles" in said and parts.CONVERT in said
    exec(parts.CONVERT, dict(torch=torch, safetensors=safetensors, path=tmp_path / "a.ckpt", target=(target := tmp_path / "a.safetensors")))
    assert torch.equal(noise_of(load_model(target, device="cpu", tokenizer=WORDS)), noise_of(load_model(path, device="cpu", tokenizer=WORDS)))


def test_a_shared_model_follows_the_file(tmp_path, monkeypatch):
    cache_words(monkeypatch, tmp_path / "hub")
    path = save_original(sd1(0), tmp_path / "a.safetensors")
    model = shared_model(str(path), "cpu")
    assert shared_model(str(path), "cpu") is model
    save_original(sd1(1), path)
    assert shared_model(str(path), "cpu") is not model


def test_the_panel_edits_with_a_file(tmp_path, monkeypatch):
    cache_words(monkeypatch, tmp_path / "hub")
    path = save_original(sd1(), tmp_path / "a.safetensors", {"modelspec.resolution": "64x64"})
    state = EditState(CLIP, model=str(path), store=Store(tmp_path / "store"))
    try:
        assert state._ready(type("Job", (), dict(settings=dict(model=str(path))))).name == str(path)
    finally:
        state.close()


# ---- folders of one variant, XL by name


def half_only(folder):
    "Only weights of half precision, as many repositories have them."
    for path in [*folder.rglob("*.safetensors")]:
        half = {key: value.half() if value.is_floating_point() else value for key, value in load_file(path).items()}
        save_file(half, path.with_suffix(".fp16.safetensors"), metadata=dict(format="pt"))
        path.unlink()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_of_half_precision_serves_in_every_form(form, dtype, files, tmp_path):
    full = files[form][1].with_suffix("")
    half_only(folder := Path(shutil.copytree(full, tmp_path / "half")))
    one, other = load_model(folder, device="cpu", dtype=dtype), load_model(full, device="cpu", dtype=dtype)
    assert str(one.dtype) == f"torch.{dtype}" and torch.allclose(noise_of(one).float(), noise_of(other).float(), atol=0.05)


def test_xl_by_name_is_what_its_pipeline_is(files, tmp_path):
    pipe, path = files["xl"]
    folder = path.with_suffix("")
    by_name = load_model(folder, device="cpu")
    theirs = load_model(StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32))
    assert torch.equal(noise_of(by_name), noise_of(theirs)) and by_name.pipe.config.force_zeros_for_empty_prompt
    assert not by_name.embed("").states.any() and by_name.guidance_scale == 5.0
    result = edit_video(CLIP, "a gold star", model=folder, store=Store(tmp_path), **FEW)
    assert len(result.edited) == 3


def test_the_alias_of_xl_is_there():
    info = MODELS["sdxl"]
    assert info.ids == ("stabilityai/stable-diffusion-xl-base-1.0",) and info.guidance_scale == 5.0 and info.size_gb == 7.0


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


XL_DAMAGES = {
    "no second encoder": (lambda folder: shutil.rmtree(folder / "text_encoder_2"), "folder text_encoder_2 is missing"),
    "no second words": (lambda folder: (folder / "tokenizer_2" / "tokenizer.json").unlink(), "tokenizer_2 has no vocabulary"),
    "no weights": (lambda folder: (folder / "text_encoder_2" / "model.safetensors").unlink(), "text_encoder_2 has no weights"),
    "another width": (lambda folder: edit_json(folder / "text_encoder_2" / "config.json", hidden_size=64), "text_encoder_2 has hidden_size=64, unet cross_attention_dim=192"),
    "another projection": (lambda folder: edit_json(folder / "text_encoder_2" / "config.json", projection_dim=7), "projection_dim=7"),
    "another unet": (lambda folder: edit_json(folder / "unet" / "config.json", addition_embed_type=None), "unet is not that of Stable Diffusion XL"),
    "inpainting": (lambda folder: edit_json(folder / "unet" / "config.json", in_channels=9), "an inpainting model"),
    "a refiner": (lambda folder: edit_json(folder / "model_index.json", text_encoder=[None, None]), "no text_encoder"),
    "its own code": (lambda folder: edit_json(folder / "model_index.json", text_encoder_2=["mine", "Text"]), "code of a model is never run"),
}


@pytest.mark.parametrize("case", XL_DAMAGES)
def test_a_folder_of_xl_that_cannot_serve_says_which_part(case, files, tmp_path):
    damage, words = XL_DAMAGES[case]
    damage(folder := Path(shutil.copytree(files["xl"][1].with_suffix(""), tmp_path / "xl")))
    assert words in (said := refusal(folder)), said


def test_what_is_fetched_of_xl_are_all_its_parts(files):
    folder = files["xl"][1].with_suffix("")
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    chosen = set(parts.model_files([*names, "sd_xl_base_1.0.safetensors", "unet/model.onnx"], half=False))
    assert {"text_encoder_2/model.safetensors", "tokenizer_2/tokenizer.json", "unet/diffusion_pytorch_model.safetensors"} <= chosen <= {*names}


# ---- LoRA


def test_a_lora_by_name_is_what_its_pipeline_is(detail):
    pipe = toy_pipe()
    pipe.load_lora_weights(str(detail), adapter_name="lora_0")
    pipe.set_adapters(["lora_0"], [0.8])
    model = load_model("toy", device="cpu", lora=f"{detail}:0.8")
    assert model.name == "toy + detail.safetensors:0.8" and model.guidance_scale == 4.0
    assert torch.equal(noise_of(model, 32), noise_of(load_model(pipe), 32)) and model.digest == load_model(pipe).digest
    assert not torch.allclose(noise_of(model, 32), noise_of(load_model("toy", device="cpu"), 32), atol=1e-3)


def test_several_loras_have_each_its_strength(detail, tmp_path):
    other = save_lora(toy_pipe(), tmp_path / "other.safetensors", 2)
    pipe = toy_pipe()
    pipe.load_lora_weights(str(detail), adapter_name="lora_0")
    pipe.load_lora_weights(str(other), adapter_name="lora_1")
    pipe.set_adapters(["lora_0", "lora_1"], [0.5, -1.0])
    wanted = noise_of(load_model(pipe), 32)
    for lora in ([f"{detail}:0.5", f"{other}:-1"], {detail: 0.5, str(other): -1}, (f"{detail}:.5", f"{other}:-1.0")):
        model = load_model("toy", device="cpu", lora=lora)
        assert torch.equal(noise_of(model, 32), wanted) and model.name == "toy + detail.safetensors:0.5 + other.safetensors:-1"
    for lora in (detail, [detail], str(detail)):
        assert load_model("toy", device="cpu", lora=lora).name == "toy + detail.safetensors:1"


def test_strength_zero_is_the_model_itself(detail):
    assert torch.allclose(noise_of(load_model("toy", device="cpu", lora=f"{detail}:0"), 32), noise_of(load_model("toy", device="cpu"), 32), atol=1e-5)


@pytest.mark.parametrize("name", ["C:\\x.safetensors", "a:b.safetensors", "three:0.8"])
def test_paths_with_colons_work(name, detail, tmp_path, monkeypatch):
    "The last one is a file whose name ends like a strength."
    monkeypatch.chdir(tmp_path)
    if name.startswith("three"):
        (folder := tmp_path / name).mkdir()
        shutil.copy(detail, folder / "pytorch_lora_weights.safetensors")
        assert load_model("toy", device="cpu", lora=name).name.endswith("pytorch_lora_weights.safetensors:1")
        return
    shutil.copy(detail, name)
    assert load_model("toy", device="cpu", lora=name).name.endswith(":1")
    assert load_model("toy", device="cpu", lora=f"{name}:0.8").name.endswith(f"{name}:0.8")


def kohya(path, target):
    "A LoRA with the keys of kohya's program, and its alpha: half the rank, so that it acts half as strongly."
    found = {}
    for key, value in load_file(path).items():
        place, kind = re.fullmatch(r"unet\.(.*)\.(lora[._]A|lora[._]B)\.weight", key).groups()
        name = f"lora_unet_{place.replace('.', '_')}"
        found[f"{name}.{'lora_down' if kind.endswith('A') else 'lora_up'}.weight"] = value
        found[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(found, target)
    return target


def test_a_lora_in_kohyas_form_keeps_its_alpha(detail, tmp_path):
    path = kohya(detail, tmp_path / "kohya.safetensors")
    half, whole = load_model("toy", device="cpu", lora=f"{detail}:0.5"), load_model("toy", device="cpu", lora=path)
    assert torch.allclose(noise_of(half, 32), noise_of(whole, 32), atol=1e-5)


def test_a_lora_and_a_vae_go_into_a_file_and_into_xl(files, tmp_path):
    pipe, path = files["xl"]
    lora = save_lora(xl(), tmp_path / "style.safetensors")
    for place in (path, path.with_suffix("")):
        words = dict(tokenizer=WORDS) if place.is_file() else {}
        plain, added = (load_model(place, device="cpu", lora=each, **words) for each in (None, lora))
        assert added.name == f"{place} + style.safetensors:1" and not torch.allclose(noise_of(plain), noise_of(added), atol=1e-3)


def test_an_edit_with_a_lora_says_so_and_leaves_all_files_alone(detail, tmp_path):
    before = {path: path.read_bytes() for path in (*TOY_FOLDER.rglob("*.safetensors"), detail)}
    result = edit_video(CLIP, "a gold star", model="toy", lora=f"{detail}:0.8", out=tmp_path / "out", store=Store(tmp_path / "store"), **FEW)
    plain = edit_video(CLIP, "a gold star", model="toy", store=Store(tmp_path / "store"), **FEW)
    assert not np.array_equal(result.edited.frames, plain.edited.frames)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["model"]["name"] == "toy + detail.safetensors:0.8"
    assert all(path.read_bytes() == content for path, content in before.items())


KEY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
NOT_A_LORA = {  # weights, and what is said of them
    "of XL": ({KEY: torch.zeros(4, 2048)}, "a LoRA of Stable Diffusion XL .text width 2048., and the model is another model .text width 96."),
    "of FLUX": ({"transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight": torch.zeros(4, 9)}, "a LoRA of FLUX"),
    "of another family": ({"diffusion_model.blocks.0.lora_A.weight": torch.zeros(4, 9)}, "a LoRA of another family"),
    "a model": ({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4)}, "no LoRA.*given as model="),
    "LyCORIS": ({"lora_unet_a.hada_w1_a": torch.zeros(4, 4)}, "LyCORIS"),
    "no layer": ({"somewhere.lora_A.weight": torch.zeros(4, 4)}, "matches no layer"),
}


@pytest.mark.parametrize("case", NOT_A_LORA)
def test_a_file_that_is_no_fitting_lora_is_refused_before_weights_are_read(case, tmp_path, monkeypatch):
    weights, words = NOT_A_LORA[case]
    save_file(weights, path := tmp_path / "a.safetensors")
    no_weights(monkeypatch)
    said = refusal("toy", lora=f"{path}:0.8", kind=AddedError)
    assert re.search(words, said) and f"lora={str(path)!r}" in said, said


def test_a_lora_whose_layers_are_not_there_is_refused_before_any_evaluation(detail, tmp_path):
    state = {key.replace("attentions.", "attentions.7"): value for key, value in load_file(detail).items()}
    save_file(state, path := tmp_path / "a.safetensors")
    assert re.search("matches no layer|does not fit the layers", refusal("toy", lora=path, kind=AddedError))
    save_file({key: value[:, :3].contiguous() if "lora.down" in key or "lora_A" in key else value for key, value in load_file(detail).items() if "attn2" not in key}, path)
    assert "does not fit the layers of the model" in refusal("toy", lora=path, kind=AddedError)


def test_a_lora_with_a_few_layers_too_many_is_warned_of(detail, tmp_path):
    state = load_file(detail)
    down = next(key for key in state if "lora_A" in key or "lora.down" in key)
    up = down.replace("lora_A", "lora_B").replace("lora.down", "lora.up")
    state |= {key.replace("_blocks.", "_blocks.9", 1): state[key].clone() for key in (down, up)}
    save_file(state, path := tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="lora a.safetensors: 1 of its .* layers are not in the model"):
        load_model("toy", device="cpu", lora=path)


STRENGTHS = {
    "word": ("FILE:strong", "'strong' is no strength"), "empty": ("FILE:", "'' is no strength"), "nan": ("FILE:nan", "its strength is nan"),
    "infinite": ({"FILE": float("inf")}, "its strength is inf"), "text": ({"FILE": "0.8"}, "its strength is '0.8'"), "switch": ({"FILE": True}, "its strength is True"),
    "number": (5, "lora=5"), "list of numbers": ([5], "lora=5"), "no file": ("no.safetensors", "there is no such file"),
}


@pytest.mark.parametrize("case", STRENGTHS)
def test_a_strength_or_a_path_that_does_not_parse(case, detail, monkeypatch):
    value, words = STRENGTHS[case]
    value = {str(detail): next(iter(value.values()))} if isinstance(value, dict) else value.replace("FILE", str(detail)) if isinstance(value, str) else value
    no_weights(monkeypatch)
    assert words in (said := refusal("toy", lora=value, kind=AddedError)), said


def test_a_folder_of_several_loras_wants_a_name_and_that_helps(detail, tmp_path):
    for name in ("one", "two"):
        shutil.copy(detail, tmp_path / f"{name}.safetensors")
    assert "there are 2 of them (one.safetensors, two.safetensors): give the file" in refusal("toy", lora=tmp_path, kind=AddedError)
    assert load_model("toy", device="cpu", lora=tmp_path / "one.safetensors").name.endswith("one.safetensors:1")


def test_a_lora_of_pickles_is_refused_and_the_conversion_helps(detail, tmp_path):
    torch.save(load_file(detail), tmp_path / "a.pt")
    assert parts.CONVERT in (said := refusal("toy", lora=f"{tmp_path / 'a.pt'}:0.5", kind=AddedError)) and "pickles" in said
    exec(parts.CONVERT, dict(torch=torch, safetensors=safetensors, path=tmp_path / "a.pt", target=(target := tmp_path / "a.safetensors")))
    assert torch.equal(noise_of(load_model("toy", device="cpu", lora=target), 32), noise_of(load_model("toy", device="cpu", lora=detail), 32))


@pytest.mark.parametrize("online", [True, False])
def test_loras_and_vaes_come_from_the_hub_by_id(online, detail, vaes, tmp_path, monkeypatch):
    "Without the hub, `fetch` gives the copy in the cache, and chooses nothing."
    (repository := tmp_path / "snapshot").mkdir()
    shutil.copy(detail, repository / "detail.safetensors")
    asked = []

    def fetch(name, choose):
        asked.append((name, online and choose([path.name for path in repository.iterdir()])))
        return repository, None if online else "offline"

    monkeypatch.setattr("tokenflow_nb.backbones.added.fetch", fetch)
    for lora in ("owner/name:0.5", "owner/name/detail.safetensors:0.5"):
        assert load_model("toy", device="cpu", lora=lora).name == "toy + detail.safetensors:0.5"
        assert asked.pop() == ("owner/name", online and ["detail.safetensors"])
    assert "has no file other.safetensors" in refusal("toy", lora="owner/name/other.safetensors", kind=AddedError)
    shutil.copytree(vaes[1]["folder"], repository, dirs_exist_ok=True)
    asked.clear()
    assert load_model("toy", device="cpu", vae="owner/name").name == "toy + VAE name"
    assert asked == [("owner/name", online and ["config.json", "diffusion_pytorch_model.safetensors"])]


def test_peft_that_is_missing_is_named(detail, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("tokenflow_nb.backbones.added.find_spec", lambda name: None if name == "peft" else found(name))
    assert 'needs the package peft: pip install "tokenflow_nb[lora]"' in refusal("toy", lora=detail, kind=AddedError)


def test_two_sources_of_one_setting_are_refused_and_the_remedy_helps(detail, store):
    pipe, toy = toy_pipe(), load_model("toy", device="cpu")
    said = refusal(pipe, lora=str(detail), kind=AddedError, device=None)
    assert "together with a pipeline" in said and "pipe.load_lora_weights(path), and leave it out" in said
    assert "together with a pipeline" in refusal(pipe, vae=TOY_FOLDER, kind=AddedError, device=None)
    for given in (dict(lora=str(detail)), dict(vae=TOY_FOLDER)):
        assert "together with a loaded model" in refusal(toy, **given, kind=AddedError)
        with pytest.raises(AddedError, match="together with"):
            edit_video(CLIP, "a gold star", model=toy, **given, **FEW)
    pipe.load_lora_weights(str(detail))
    edit_video(CLIP, "a gold star", model=pipe, store=store, **FEW)


# ---- another VAE


@pytest.fixture(scope="module")
def vaes(tmp_path_factory):
    "One VAE in each form in which people have it."
    folder = tmp_path_factory.mktemp("vaes")
    vae = tiny_vae(7)
    vae.save_pretrained(folder / "folder")
    weights = {key: value.clone().contiguous() for key, value in original_vae(vae).items()}
    save_file(weights, folder / "alone.safetensors")
    save_file({f"first_stage_model.{key}": value.clone() for key, value in weights.items()}, folder / "prefixed.safetensors")
    whole = sd1(vae=vae)
    whole.save_pretrained(folder / "whole")
    places = dict(folder=folder / "folder", alone=folder / "alone.safetensors", prefixed=folder / "prefixed.safetensors")
    places |= dict(converted=folder / "folder" / "diffusion_pytorch_model.safetensors", whole=folder / "whole")
    return vae, places


@pytest.mark.parametrize("form", ["folder", "alone", "prefixed", "converted", "whole"])
def test_another_vae_is_taken_from_every_form(form, vaes):
    vae, places = vaes
    model = load_model("toy", device="cpu", vae=places[form])
    assert all(torch.equal(value, model.vae.state_dict()[key]) for key, value in vae.state_dict().items())
    assert model.name == f"toy + VAE {places[form].name}" and model.digest != load_model("toy", device="cpu").digest
    assert model.decode(model.encode(CLIP.frames[:1])).shape == (1, 64, 64, 3)


def test_a_file_without_a_vae_takes_another_one(vaes, tmp_path):
    save_file(without("first_stage_model."), path := tmp_path / "a.safetensors")
    model = load_model(path, device="cpu", tokenizer=WORDS, vae=vaes[1]["alone"])
    assert all(torch.equal(value, model.vae.state_dict()[key]) for key, value in vaes[0].state_dict().items())


def test_the_scale_of_a_vae_in_a_file_is_that_of_the_models_family(files, vaes):
    model = load_model(files["xl"][1], device="cpu", tokenizer=WORDS, vae=vaes[1]["alone"])
    assert model.vae.config.scaling_factor == 0.13025 and load_model("toy", device="cpu", vae=vaes[1]["alone"]).vae.config.scaling_factor == 0.18215


def _sixteen(folder):
    tiny_vae(latent_channels=16).save_pretrained(folder / "a")
    return folder / "a"


def _sixteen_in_a_file(folder):
    save_file({key: value.contiguous() for key, value in original_vae(tiny_vae(latent_channels=16)).items()}, folder / "a.safetensors")
    return folder / "a.safetensors"


def _moved(folder):
    tiny_vae().save_pretrained(folder / "a")
    shutil.move(folder / "a" / "diffusion_pytorch_model.safetensors", folder / "b.safetensors")
    return folder / "b.safetensors"


def _pickled(folder):
    tiny_vae().save_pretrained(folder / "a", safe_serialization=False)
    return folder / "a"


WRONG_VAES = {
    "16 channels": (_sixteen, "latent_channels=16, unet in_channels=4"), "16 channels in a file": (_sixteen_in_a_file, "latent_channels=16, unet in_channels=4"),
    "without its configuration": (_moved, "has no config.json: give a VAE's folder"), "a unet": (lambda folder: TOY_FOLDER / "unet", "vae is a UNet2DConditionModel"),
    "a pickle": (_pickled, r"only pickles.*AutoencoderKL.from_pretrained"), "nothing": (lambda folder: folder / "no", "no such file or folder"), "a number": (lambda folder: 5, "vae=5: give"),
    "no VAE": (lambda folder: folder, "no config.json"),
}


@pytest.mark.parametrize("case", WRONG_VAES)
def test_a_vae_that_does_not_fit_is_refused_before_weights_are_read(case, tmp_path, monkeypatch):
    make, words = WRONG_VAES[case]
    place = make(tmp_path)
    no_weights(monkeypatch)
    assert re.search(words, said := refusal("toy", vae=place, kind=AddedError)), said


# ---- the command line


def test_the_command_line_takes_files_loras_and_a_vae(files, detail, vaes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    from tokenflow_nb.clip import write_clip

    write_clip(tmp_path / "clip.mp4", CLIP)
    few = ["--size", "64x64", "--steps", "2", "--quiet"]
    added = ["--model", "toy", "--lora", f"{detail}:0.8", "--lora", f"{detail}:-0.2", "--vae", str(vaes[1]["alone"])]
    assert main(["edit", "clip.mp4", "a gold star", "--out", "out", *added, "--device", "cpu", "--keyframe-interval", "2", *few]) == 0
    name = "toy + detail.safetensors:0.8 + detail.safetensors:-0.2 + VAE alone.safetensors"
    assert json.loads((tmp_path / "out" / "run.json").read_text())["model"]["name"] == name
    assert main(["invert", "clip.mp4", "a star", "--model", str(files["sd1"][1]), "--tokenizer", str(WORDS), *few]) == 0
    capsys.readouterr()
    assert main(["edit", "clip.mp4", "a gold star", "--model", "toy", "--lora", f"{detail}:much", "--out", "other", *few]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "'much' is no strength" in said[0]
