"""Scores from 1 to 10: as in training, the same in every process, and from the command line."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.errors import UserError
from alignment.models import LoadSettings, LoraSettings, ModelFiles
from alignment.records import PreferencePair
from alignment.reward import RewardConfig, train_reward_model
from alignment.scorer import Scorer, main, scorer_files
from alignment.training import OptimSettings

PROJECT = Path(__file__).parents[2]
PAIRS = [
    PreferencePair(id=f"p{i}", prompt=f"question {i}", chosen=f"please {i * 7} ok", rejected=f"never {i * 5} no")
    for i in range(72)
]
TRAIN, HELDOUT = PAIRS[:48], PAIRS[48:]
ANSWERS = [(p.prompt, answer) for p in HELDOUT for answer in (p.chosen, p.rejected)]


@pytest.fixture(scope="module")
def trained(tiny_model, float32, tmp_path_factory):
    """By kind of fine-tuning: the model's folder, its metrics, its table of held-out pairs."""

    def run(finetuning, heldout=HELDOUT, load=float32):
        folder = tmp_path_factory.mktemp(finetuning)
        for name in ("work", "out"):
            (folder / name).mkdir()
        config = RewardConfig(
            finetuning=finetuning,
            lora=LoraSettings(dropout=0.0, target_modules=["all-linear"]),
            load=load,
            optim=OptimSettings(epochs=6, learning_rate=3e-3, batch_size=16, micro_batch_size=16),
            score_batch_size=1,
        )
        base = ModelFiles(tiny_model)
        _, metrics, table = train_reward_model(config, base, TRAIN, heldout, work=folder / "work", out=folder / "out")
        return folder / "out" / "model", metrics, table

    return run


@pytest.fixture(scope="module")
def lora(trained):
    return trained("lora")


@pytest.fixture(scope="module")
def full(trained):
    return trained("full")


@pytest.fixture(scope="module")
def bfloat16(trained):
    return trained("full", load=LoadSettings(dtype="bfloat16"))


@pytest.fixture(params=["lora", "full", "bfloat16"])
def either(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def scorer(lora):
    return Scorer.load(scorer_files(lora[0]))


def test_better_answers_score_higher_on_a_scale_from_one_to_ten(either):
    folder, metrics, _ = either
    scorer = Scorer.load(scorer_files(folder))
    good, bad = scorer.score("question 99", "please 3 ok"), scorer.score("question 99", "never 3 no")
    assert 1 <= bad < 4 < 7 < good <= 10
    assert metrics["heldout/helpfulness_chosen"] > 7
    assert metrics["heldout/helpfulness_rejected"] < 4


def test_its_rewards_are_those_of_training_to_the_last_bit(either):
    # Training scored the held-out pairs one by one here, as `score` does; rows that share a batch differ in the last digits.
    folder, _, table = either
    scorer = Scorer.load(scorer_files(folder))
    told = [(row["prompt"], row[side]) for row in table for side in ("chosen", "rejected")]
    assert scorer.rewards(told, batch_size=1) == [row[f"reward_{s}"] for row in table for s in ("chosen", "rejected")]
    assert scorer.scores(told, batch_size=1) == [row[f"helpfulness_{s}"] for row in table for s in ("chosen", "rejected")]


def test_the_order_of_scores_is_the_order_of_rewards(scorer):
    ranked = sorted(range(len(ANSWERS)), key=scorer.rewards(ANSWERS, 1).__getitem__)
    rated = scorer.scores(ANSWERS, 1)
    assert [rated[i] for i in ranked] == sorted(rated)


def test_a_batch_gives_what_single_answers_give(scorer):
    assert scorer.scores(ANSWERS, batch_size=7) == pytest.approx([scorer.score(*a) for a in ANSWERS], abs=1e-3)
    assert scorer.scores([]) == []


def test_an_empty_answer_has_a_score(scorer):
    assert 1 <= scorer.score("question 1", "") <= 10


def lines(answers):
    return "".join(json.dumps({"id": i, "prompt": p, "response": r}) + "\n" for i, (p, r) in enumerate(answers))


def test_the_command_line_gives_in_a_new_process_the_same_bits(lora, scorer):
    command = [sys.executable, "-m", "alignment.scorer", str(lora[0])]
    done = subprocess.run(
        command, input=lines(ANSWERS[:6]), capture_output=True, text=True, timeout=120, cwd=PROJECT, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["id"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["helpfulness"].hex() for row in rows] == [scorer.score(*a).hex() for a in ANSWERS[:6]]


@pytest.fixture
def command(lora, monkeypatch):
    """Runs the command line in this process, on the model `lora`."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["scorer", str(lora[0]), *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        main()

    return run


def test_one_pair_is_given_as_arguments(command, scorer, capsys):
    command("--prompt", "question 99", "--response", "please 3 ok")
    expected = {"prompt": "question 99", "response": "please 3 ok", "helpfulness": scorer.score("question 99", "please 3 ok")}
    assert json.loads(capsys.readouterr().out) == expected


@pytest.mark.parametrize("line", ["{", '{"prompt": "a"}', '["a", "b"]', '{"prompt": "a", "response": 3}'])
def test_a_line_that_is_no_pair_is_named(command, capsys, line):
    with pytest.raises(SystemExit, match="standard input, line 2"):  # with a text: Python prints it and exits with 1
        command(stdin=lines([("a", "b")]) + line)
    assert capsys.readouterr().out == ""


def test_an_adapter_whose_base_moved_is_told_where_it_is(lora, scorer, tiny_model, tmp_path):
    folder, base = Path(shutil.copytree(lora[0], tmp_path / "model")), Path(shutil.copytree(tiny_model, tmp_path / "base"))
    settings = folder / "adapter_config.json"
    gone = json.loads(settings.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}
    settings.write_text(json.dumps(gone))
    with pytest.raises(UserError, match=r"its base model is not in .*gone\. Remedy: name the base's folder with --base"):
        scorer_files(folder)
    assert Scorer.load(scorer_files(folder, base)).score(*ANSWERS[0]) == scorer.score(*ANSWERS[0])


def test_a_folder_without_model_or_without_calibration_is_named(lora, tiny_model, tmp_path):
    with pytest.raises(UserError, match="holds no model"):
        scorer_files(tmp_path)
    with pytest.raises(UserError, match="no calibration can be read there"):
        Scorer.load(ModelFiles(tiny_model))


def test_a_model_without_held_out_pairs_is_calibrated_on_its_training_pairs_and_says_so(trained):
    folder, _, table = trained("lora", heldout=[])
    assert table == []
    calibration = Scorer.load(scorer_files(folder)).calibration
    assert (calibration.fitted_on, calibration.pairs) == ("train", len(TRAIN))


def test_a_tokenizer_with_code_of_its_own_is_trusted_where_the_settings_say_so(lora, tokenizers_with_code):
    files, trusting = scorer_files(lora[0]), LoadSettings(dtype="float32", trust_remote_code=True)
    assert 1 <= Scorer.load(files, trusting).score(*ANSWERS[0]) <= 10
    with pytest.raises(ValueError, match="trust_remote_code"):
        Scorer.load(files)
