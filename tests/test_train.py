"The toy model from nothing: all stages at tiny size, interruptions, the command line, and how large the real one is."
import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from tokenflow_nb.backbones.load import TOY_FOLDER, load_model
from tokenflow_nb.toy import language, recipe, train as program, unet, vae
from tokenflow_nb.toy.recipe import RESULTS, Budget, Recipe, Run, read_facts
from tokenflow_nb.toy.train import train
from tokenflow_nb.toy.unet import UNetTraining, load_checkpoint, train_unet
from tokenflow_nb.toy.world import captions

LATENTS = [f"latents_{size}_{part}.npy" for size in ("half", "whole") for part in ("mean", "std")]
UNET_INPUTS = ["recipe.json", "tokenizer", "vision.safetensors", "masks.npy", *LATENTS]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Run:
    "All stages, from scratch; the UNet by as many processes as a user would get."
    folder = tmp_path_factory.mktemp("training")
    run = Run(folder / "run", Recipe.tiny(), out=folder / "toy")
    train(run)
    return run


@pytest.fixture
def before_unet(made, tmp_path) -> Run:
    "A folder in which only the UNet is missing; one process, and a checkpoint at every step."
    folder = tmp_path / "run"
    folder.mkdir()
    for name in UNET_INPUTS:
        (folder / name).symlink_to(made.folder / name)
    return replace(made, folder=folder, recipe=Recipe.tiny(budget=Budget(steps=6), checkpoint_minutes=1e-9))


def interrupt_at(monkeypatch, last: int) -> list[int]:
    "Makes the UNet's training stop like a killed one before the step `last`; gives the steps that were made."
    made, work = [], unet._unet_step

    def step(training, batches, step, *args):
        if step == last:
            raise KeyboardInterrupt
        made.append(step)
        return work(training, batches, step, *args)

    monkeypatch.setattr(unet, "_unet_step", step)
    return made


def test_the_folder_is_what_diffusers_and_the_package_load(made):
    model = load_model(made.out, device="cpu")
    pipeline = StableDiffusionPipeline.from_pretrained(made.out)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a gold star on grass", num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (64, 64, 3)
    assert model.size == 64 and model.schedule.prediction_type == "v_prediction"
    trained = load_file(made.folder / "unet.safetensors")
    for name, weight in model.unet.state_dict().items():
        torch.testing.assert_close(weight, trained[name].half().float(), rtol=0, atol=0)


def test_no_file_of_the_model_names_a_place_on_the_machine_that_made_it(made):
    texts = {path: path.read_text() for path in made.out.rglob("*.json")}
    assert len(texts) > 8
    assert not [path for path, text in texts.items() if str(made.folder.parent) in text or str(Path.home()) in text]
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in made.out.rglob("*.safetensors"))


def test_the_log_has_the_losses_of_every_stage_that_learns(made):
    with (made.folder / "log.csv").open() as file:
        last = {row["stage"]: row for row in csv.DictReader(file)}
    terms = dict(text=["loss", "word", "caption"], vae=["loss", "l1", "l2", "psnr"], decoder=["psnr"], vision=["loss", "contrastive", "mask"], unet=["loss", "x0_error"])
    for stage, names in terms.items():
        assert all(float(last[stage][name]) > 0 for name in names), last[stage]
    assert last["text"]["step"] == "20" and last["unet"]["step"] == "4"


def test_what_is_done_is_not_done_again_and_nothing_is_left_half_written(made, capsys):
    times = {path: path.stat().st_mtime_ns for path in made.folder.iterdir()}
    train(made, tuple(stage for stage in program.STAGES if stage != "assemble"))
    assert capsys.readouterr().out.count("done before") == len(RESULTS)
    assert times == {path: path.stat().st_mtime_ns for path in made.folder.iterdir()}
    assert not [path.name for path in times if path.suffix == ".new" or path.name.startswith("meeting")]


def test_an_interrupted_unet_goes_on_from_the_step_and_the_tensors_it_saved(before_unet, monkeypatch):
    with monkeypatch.context() as patch:
        assert interrupt_at(patch, 3) is not None
        with pytest.raises(KeyboardInterrupt):
            train_unet(before_unet, processes=1)
    file = before_unet.folder / "unet_checkpoint.safetensors"
    assert read_facts(file)["step"] == 3 and not (before_unet.folder / "unet.safetensors").exists()

    training = UNetTraining(before_unet)
    assert load_checkpoint(file, training)[0] == 3
    saved = load_file(file)
    for name, master, average in zip(training.names, training.master, training.average):
        assert torch.equal(master, saved[f"master.{name}"]) and torch.equal(average, saved[f"average.{name}"])
        assert torch.equal(training.optimizer.state[master]["exp_avg_sq"], saved[f"exp_avg_sq.{name}"])

    with monkeypatch.context() as patch:
        steps = interrupt_at(patch, -1)
        train_unet(before_unet, processes=1)
    assert steps == [3, 4, 5]


def test_an_interruption_changes_no_bit_of_the_result(before_unet, tmp_path, monkeypatch):
    whole = replace(before_unet, folder=tmp_path / "whole")
    whole.folder.mkdir()
    for name in UNET_INPUTS:
        (whole.folder / name).symlink_to((before_unet.folder / name).resolve())
    train_unet(whole, processes=1)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            train_unet(before_unet, processes=1)
    train_unet(before_unet, processes=1)
    first, second = (load_file(run.folder / "unet.safetensors") for run in (whole, before_unet))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_more_steps_go_on_from_the_end_of_an_earlier_budget(before_unet, monkeypatch):
    train_unet(before_unet, processes=1)
    steps = interrupt_at(monkeypatch, -1)
    train_unet(replace(before_unet, recipe=Recipe.tiny(budget=Budget(steps=8))), processes=1)
    assert steps == [6, 7]
    assert torch.tensor(1e-40) * 1 > 0, "numbers that small are rounded to nothing in the caller's process, too"


@given(
    count=st.integers(1, 400),
    shares=st.sampled_from([Recipe().timestep_shares, ((250, 0.5), (1000, 0.5)), ((100, 0.1), (900, 0.2), (1000, 0.7))]),
    seed=st.integers(0, 2**32 - 1),
)
def test_timesteps_have_the_shares_of_the_recipe_in_every_batch(count, shares, seed):
    times = unet.draw_timesteps(count, Recipe(timestep_shares=shares), torch.Generator().manual_seed(seed))
    assert times.shape == (count,) and times.min() >= 0 and times.max() <= 999
    first = 0
    for last, share in shares:
        middle = (first + last) // 2
        for low, high, wanted in ((first, last, share), (first, middle, share / 2), (middle, last, share / 2)):
            assert abs(int(((times >= low) & (times < high)).sum()) - wanted * count) < 2  # one may fall on either side of each end
        first = last


def test_the_shares_of_the_recipe_are_all_of_the_timesteps():
    ends, shares = zip(*Recipe().timestep_shares)
    assert list(ends) == sorted(set(ends)) and ends[-1] == 1000 and sum(shares) == 1 and min(shares) > 0


def test_a_blinded_picture_shows_the_unet_nothing_of_itself(before_unet, monkeypatch):
    run = replace(before_unet, recipe=Recipe.tiny(batch=(16, 16), blind_share=0.5, timestep_shares=((950, 0.25), (1000, 0.75))))
    training, batches, shown = UNetTraining(run), unet.NoisyPictures(run), []
    training.unet.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0].clone()))
    batch = batches.draw(0, 0, 0.9)
    for clean in (batch.clean, batch.clean.flip(0)):  # other pictures under the same noise
        monkeypatch.setattr(batches, "draw", lambda *which, clean=clean: batch._replace(clean=clean))
        unet._unet_step(training, batches, 0, 0, 0.9)
    blind, same = batch.seen == 0, (shown[0] == shown[1]).flatten(1).all(1)
    assert 0 < blind.sum() < (batch.times >= 950).sum() < 16  # all three kinds of pictures are in the batch
    assert torch.equal(same, blind) and torch.equal(shown[0][blind], batch.noise[blind].bfloat16())
    assert torch.equal(batch.seen[~blind], batch.level[~blind]) and (batch.level > 0).all()


def test_weights_to_start_from_spare_the_time_at_half_size(before_unet):
    runs = [run.without_gentle_start() for run in (before_unet, replace(before_unet, init=TOY_FOLDER))]
    assert runs[0] == before_unet and before_unet.recipe.small_share > 0 < before_unet.recipe.thin_share
    batches = [unet.NoisyPictures(run) for run in runs]
    sides = [each.draw(0, 0, 0.0).clean.shape[-1] for each in batches]
    assert sides == [before_unet.recipe.size // 8, before_unet.recipe.size // 4]  # latents have a quarter of the side
    last = [max(int(each.rows(64, 0.0, torch.Generator().manual_seed(0))[0].max()) for _ in range(8)) for each in batches]
    assert last[0] < last[1] == before_unet.recipe.pictures - 1 and runs[1].recipe.thin_share == 0


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "weights.safetensors"
    recipe.save_tensors(file, {"a": torch.zeros(2)}, step=1)
    with pytest.raises(RuntimeError), recipe.replacing(file) as new:
        new.write_bytes(b"half")
        raise RuntimeError
    assert read_facts(file) == {"step": 1} and torch.equal(load_file(file)["a"], torch.zeros(2))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> CLIPTokenizer:
    run = Run(tmp_path_factory.mktemp("tokenizer"), Recipe())
    train(run, ("tokenizer",))
    return language.load_tokenizer(run)


def test_every_word_of_the_world_is_one_token(tokenizer):
    words = {word for caption in captions() for word in caption.split()} | {"golden", "wood", "lawn", "beach", ","}
    assert not [word for word in words if len(tokenizer(word).input_ids) != 3]


@given(text=st.text(max_size=30))
def test_any_text_encodes_without_a_loss(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[1:-1]  # it stands for what cannot be encoded


@given(text=st.text("abgoldw 019,.!&é狼", max_size=30))
def test_what_is_encoded_decodes_to_the_same_letters(tokenizer, text):
    decoded = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
    assert "".join(decoded.split()) == "".join(text.split())


def test_the_tokenizer_is_the_one_that_ships(tokenizer):
    assert tokenizer.get_vocab() == CLIPTokenizer.from_pretrained(TOY_FOLDER / "tokenizer").get_vocab()


def test_the_full_recipe_makes_a_folder_below_12_mb(tmp_path):
    run = Run(tmp_path / "run", Recipe(), out=tmp_path / "toy")
    train(run, ("tokenizer",))
    parts = dict(text=language.make_clip(run), decoder=vae.make_vae(run.recipe), unet=unet.make_unet(run.recipe))
    for name, part in parts.items():
        recipe.save_tensors(run.folder / f"{name}.safetensors", part.state_dict())
    train(run, ("assemble",))
    assert 10e6 < sum(path.stat().st_size for path in run.out.rglob("*") if path.is_file()) < 12e6
    assert load_model(run.out, device="cpu").size == 128


@pytest.mark.parametrize("arguments, said", [
    (["--stages", "unett"], "stages=unett: choose from tokenizer"),
    (["--hours", "0"], "give a number above 0"),
    (["--minutes-vae", "nan"], "give a number above 0"),
    (["--pictures", "0"], "pictures=0"),
    (["--init", "nowhere"], "init=nowhere: give a folder"),
    (["--prediction-type", "x0"], "invalid choice"),
])
def test_a_bad_option_is_named_before_anything_is_written(arguments, said, tmp_path, capsys):
    folder = tmp_path / "training"
    with pytest.raises(SystemExit) as stopped:
        program.main(["--device", "cpu", "--folder", str(folder), *arguments])
    assert stopped.value.code == 2 and said in capsys.readouterr().err and not folder.exists()


@pytest.mark.slow
def test_the_command_goes_on_from_the_weights_that_ship(tmp_path):
    command = [sys.executable, "-m", "tokenflow_nb.toy.train", "--device", "cpu", "--init", TOY_FOLDER]
    command += ["--pictures", "8", "--minutes-decoder", "0.01", "--minutes-vision", "0.01", "--hours", "0.0001"]
    command += ["--folder", tmp_path / "run", "--out", tmp_path / "toy"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "python -m tokenflow_nb.toy.evaluate" in done.stdout.splitlines()[-1]
    for part, changed in (("text_encoder", False), ("vae", True), ("unet", True), ("clip_model", True)):
        old, new = (load_file(next((folder / part).glob("*.safetensors"))) for folder in (TOY_FOLDER, tmp_path / "toy"))
        assert old.keys() == new.keys() and any(not torch.equal(old[name], new[name]) for name in old) == changed
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["init"] == str(TOY_FOLDER)
