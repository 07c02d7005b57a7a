"""Learning curves of ablations (scripts/plot_curves.py) and measures of attention along training (scripts/trace_focus.py)."""

import csv
import json
import math
import shutil

import pytest
import torch
from matplotlib.figure import Figure

import scripts.evaluate_all
import scripts.plot_curves
import scripts.trace_focus
from analysis.curves import by_arm, draw_means
from analysis.maps import capture
from analysis.measures import entropy
from analysis.summary import OWN, WITH_CONVOLUTION
from jobs.evaluations import Evaluation, read_evaluations
from jobs.inspect import InspectedImages
from jobs.model import open_model
from jobs.predict import find_images
from scripts.plot_curves import draw_tokens
from scripts.trace_focus import Measurement
from tests.launch import run_main, run_script
from utils.errors import ConfigError
from utils.files import read_csv, write_csv
from utils.run_files import list_checkpoints


def write_run(folder, accuracies, *, ema=(), global_batch_size=0):
    """Write the files of a run with two updates per epoch, whose batches have 10 images in each of two forward passes.

    Args:
        ema: epochs in which the EMA weights were evaluated too; their accuracy is higher by 5.
    """
    folder.mkdir(parents=True)
    batch = f"BATCH_SIZE: 10, GLOBAL_BATCH_SIZE: {global_batch_size}"
    (folder / "config.yaml").write_text(f"DATA: {{{batch}}}\nTRAIN: {{ACCUMULATION_STEPS: 2}}\n")
    records = []
    for epoch, accuracy in enumerate(accuracies):
        records += [{"step": 2 * epoch + update, "kind": "train", "loss": 1.0} for update in (1, 2)]
        evaluation = {"step": 2 * epoch + 2, "epoch": epoch, "loss": 0.5}
        if epoch in ema:  # on resume, a lost record of the raw weights is restored after that of the EMA weights
            records.append(evaluation | {"kind": "eval_ema", "acc1": accuracy + 5})
        records.append(evaluation | {"kind": "eval_raw", "acc1": accuracy})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))


def test_the_csv_file_of_an_ablation_has_all_evaluations_and_gives_the_same_picture(tmp_path):
    write_run(tmp_path / "out/model/focused_function_0", [50.0, 60.0])
    write_run(tmp_path / "out/model/focused_function_1", [52.0], global_batch_size=30)
    write_run(tmp_path / "out/model/softmax_0", [40.0, 41.0], ema=[1])
    arguments = [tmp_path / "out", "--csv", tmp_path / "curves.csv", "--png", tmp_path / "curves.png"]
    outcome = run_script(scripts.plot_curves, arguments, tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert read_evaluations(tmp_path / "curves.csv") == [
        Evaluation("focused function", 0, 1, 2, 40, "raw", 50.0, 0.5),
        Evaluation("focused function", 0, 2, 4, 80, "raw", 60.0, 0.5),
        Evaluation("focused function", 1, 1, 2, 60, "raw", 52.0, 0.5),
        Evaluation("softmax", 0, 1, 2, 40, "raw", 40.0, 0.5),
        Evaluation("softmax", 0, 2, 4, 80, "ema", 46.0, 0.5),
    ]
    outcome = run_script(scripts.plot_curves, [tmp_path / "curves.csv", "--png", tmp_path / "again.png"], tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "curves.png").read_bytes()
    contents = {"{}": "not a file of benchmark.py arms", '{"records": []}': "lacks the arm focused function"}
    for content, message in (contents | {'{"records": [{"arm": "softmax"}]}': "not a file of benchmark.py arms"}).items():
        (tmp_path / "steps.json").write_text(content)
        outcome = run_script(scripts.plot_curves, [*arguments, "--steps", tmp_path / "steps.json"], tmp_path / "log")
        assert outcome.exit_codes == [2]
        assert message in outcome.output


def test_an_output_that_is_also_an_input_or_another_output_is_refused_and_the_input_is_kept(tmp_path):
    write_run(tmp_path / "out/model/arm_0", [50.0])
    steps = tmp_path / "steps.json"
    steps.write_text("{}")
    for arguments in (["--steps", steps, "--csv", tmp_path / "out/../steps.json"], ["--csv", tmp_path / "curves.png"]):
        arguments = [tmp_path / "out", "--png", tmp_path / "curves.png", *arguments]
        outcome = run_script(scripts.plot_curves, arguments, tmp_path / "log")
        assert outcome.exit_codes == [2]
        assert "is also another argument, whose file would be lost; choose another file" in outcome.output
    arguments = [steps, "--data-path", tmp_path, "--csv", steps]  # as a checkpoint
    outcome = run_script(scripts.evaluate_all, arguments, tmp_path / "log")
    assert outcome.exit_codes == [2]
    assert "--csv" in outcome.output
    assert "is also another argument, whose file would be lost; choose another file" in outcome.output
    assert steps.read_text() == "{}"
    assert not (tmp_path / "curves.png").exists()


def evaluations_of(arm, accuracies):
    """Evaluations of an arm; accuracies: seed -> accuracy after each epoch, of 100 images."""
    return [
        Evaluation(arm, seed, epoch, epoch, 100 * epoch, "raw", accuracy, 0.0)
        for seed, values in accuracies.items()
        for epoch, accuracy in enumerate(values, start=1)
    ]


def test_a_line_is_the_mean_over_seeds_with_a_band_of_one_deviation():
    rows = evaluations_of("arm", {0: [10.0, 20.0], 1: [14.0, 20.0]}) + evaluations_of("other", {0: [77.0]})
    rows += [row._replace(epoch=0, accuracy=value) for row, value in zip(rows[:4:2], (math.inf, 12.0), strict=True)]
    axes = Figure().subplots()
    draw_means(axes, by_arm(rows)["arm"], "accuracy", "arm", x="num_images", scale=0.5)
    (line,), (band,) = axes.lines, axes.collections
    assert list(line.get_xdata())[1:] == [50.0, 100.0]
    assert math.isnan(line.get_ydata()[0])
    assert list(line.get_ydata())[1:] == [12.0, 20.0]
    limits = {tuple(vertex) for vertex in band.get_paths()[0].vertices}
    deviation = 2 * 2**0.5  # of 10 and 14
    assert limits == {(50.0, 12.0 - deviation), (50.0, 12.0 + deviation), (100.0, 20.0)}


def test_seeds_whose_runs_are_in_progress_are_not_in_the_mean():
    axes = Figure().subplots()
    draw_means(axes, evaluations_of("arm", {0: [10.0, 20.0, 30.0], 1: [90.0], 2: [12.0, 22.0, 32.0]}), "accuracy", "arm")
    (line,) = axes.lines
    assert list(line.get_ydata()) == [11.0, 21.0, 31.0]
    assert line.get_label() == "arm (2 seeds)"


def test_the_time_axis_is_the_number_of_images_times_the_measured_time():
    rows = [row for arm in ("softmax 64", "linear 64") for row in evaluations_of(arm, {0: [50.0]})]
    steps = [{"arm": "linear 256", "tokens": 256, "ms_per_image": 1, "peak_memory_mib_per_image": 1}]
    steps += [
        {"arm": arm, "tokens": 64, "ms_per_image": milliseconds, "peak_memory_mib_per_image": 1}
        for arm, milliseconds in (("softmax 64", 600), ("softmax 64, matrix stored", 900), ("linear 64", 300))
    ]
    by_epoch, by_time, time_axes, memory_axes = draw_tokens(rows, steps).axes
    assert [list(line.get_xdata()) for line in by_epoch.lines] == [[1], [1]]
    assert [line.get_xdata()[0] for line in by_time.lines] == pytest.approx([1.0, 0.5])  # 100 images x 0.6 s
    for axes in (time_axes, memory_axes):
        lines = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
        assert lines == {"linear": [64, 256], "softmax": [64], "softmax, matrix stored": [64]}


def test_the_trace_of_a_run_has_the_measures_of_its_initial_weights_and_of_every_checkpoint(
    toy_config, toy_data, trained, tmp_path
):
    """In a run with a learning rate of zero, the measures do not change; in another run, they are those of its checkpoints."""
    options = [
        "TAG",
        "still_3",
        "SEED",
        3,
        "TRAIN.EPOCHS",
        1,
        "TRAIN.BASE_LR",
        0.0,
        "TRAIN.WARMUP_LR",
        0.0,
        "TRAIN.MIN_LR",
        0.0,
    ]
    arguments = ["--cfg", toy_config, "--data-path", toy_data, "--output", tmp_path / "out", "--opts", *options]
    outcome = run_main(list(map(str, arguments)), tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    shutil.copytree(trained.parent, tmp_path / "out/toy/moving_0")
    arguments = ["--images", toy_data / "val/class0", "--every", 6, "--csv", tmp_path / "focus.csv"]
    outcome = run_script(scripts.trace_focus, [tmp_path / "out", *arguments, "--png", tmp_path / "focus.png"], tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    rows = read_csv(tmp_path / "focus.csv", Measurement, ("arm", "epoch", "block", "form"))
    measures = {(row.arm, row.epoch): {} for row in rows}
    for row in rows:
        measures[row.arm, row.epoch][row.block, row.form] = row[-3:]
    assert set(measures) == {("still", 0), ("still", 1), ("moving", 0), ("moving", 1), ("moving", 2)}
    for block, values in measures["still", 0].items():
        assert values == pytest.approx(measures["still", 1][block], abs=2e-4)
        assert measures["moving", 0][block] != measures["moving", 2][block]
    model, _, cfg, _ = open_model(str(list_checkpoints(trained.parent)[0]), None, [], weights="ema")
    images = InspectedImages(find_images([toy_data / "val/class0"])[::6], cfg)
    values = []
    for position in range(len(images)):
        with torch.no_grad(), capture(model, ["layers.0.blocks.0.attn"]) as attentions:
            model(images.read(position)[1].unsqueeze(0))
        values.append(entropy(attentions[0].matrix()).mean().item())
    assert measures["moving", 2]["layers.0.blocks.0.attn", "own"][0] == pytest.approx(sum(values) / len(values), abs=1e-4)
    outcome = run_script(scripts.trace_focus, [tmp_path / "focus.csv", "--png", tmp_path / "again.png"], tmp_path / "log")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "focus.png").read_bytes()
    with open(tmp_path / "focus.csv", newline="") as file:
        accuracies = {(row["arm"], row["epoch"]): float(row["accuracy"]) for row in csv.DictReader(file)}
    assert math.isnan(accuracies["moving", "0"])
    records = [json.loads(line) for line in (trained.parent / "metrics.jsonl").read_text().splitlines()]
    assert accuracies["moving", "2"] == [record["acc1"] for record in records if record["kind"] == "eval_ema"][-1]


def test_runs_that_were_interrupted_or_diverged_are_drawn(tmp_path):
    """The last line of an interrupted run may be truncated; a loss that is not finite is null in metrics.jsonl."""
    folder = tmp_path / "out/model/arm_0"
    write_run(folder, [50.0])
    text = (folder / "metrics.jsonl").read_text().replace('"loss": 0.5', '"loss": null')
    (folder / "metrics.jsonl").write_text(text + '{"step": 3, "kind": "tr')
    for source in (tmp_path / "out", folder):
        outcome = run_script(scripts.plot_curves, [source, "--png", tmp_path / "curves.png"], tmp_path / "log")
        assert outcome.exit_codes == [0], outcome.output
    (evaluation,) = read_evaluations(tmp_path / "out")
    assert (evaluation.accuracy, math.isnan(evaluation.loss)) == (50.0, True)
    axes = Figure().subplots()
    draw_means(axes, [evaluation], "loss", "arm")
    (line,) = axes.lines
    assert (line.get_label(), list(map(math.isnan, line.get_ydata()))) == ("arm (1 seed)", [True])


COLUMNS = "arm,seed,epoch,step,num_images,weights,accuracy,loss\n"
ROW = "arm,0,1,2,20,raw,50,0.5\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (COLUMNS, "curves.csv has no evaluations"),
        (COLUMNS + ROW.replace("50", "high"), "curves.csv:2: could not convert string to float: 'high'; correct the row"),
        (COLUMNS + "arm,0,1,2\n", "curves.csv:2: the row has more or fewer values than columns; correct the row"),
        (COLUMNS + ROW.replace("0.5", "0.5,9"), "curves.csv:2: the row has more or fewer values than columns; correct the row"),
        (COLUMNS + ROW + ROW, "curves.csv:3: a second row with ('arm', 'seed', 'step') = ('arm', 0, 2); remove one of them"),
        (COLUMNS.replace(",", ";"), "curves.csv: expected a CSV file with the columns arm,seed,epoch"),
        ("\0\xff", "curves.csv: expected a CSV file with the columns arm,seed,epoch"),
    ],
)
def test_a_csv_file_that_is_damaged_or_of_another_program_is_an_error_with_its_line(content, message, tmp_path):
    (tmp_path / "curves.csv").write_text(content, encoding="latin-1")
    arguments = [tmp_path / "curves.csv", "--png", tmp_path / "curves.png"]
    outcome = run_script(scripts.plot_curves, arguments, tmp_path / "log")
    assert outcome.exit_codes == [2]
    assert message in outcome.output
    assert not (tmp_path / "curves.png").exists()


def test_the_metrics_of_another_program_are_an_error(tmp_path):
    write_run(tmp_path / "out/model/arm_0", [50.0])
    for record in (
        '{"step": 1, "kind": "eval_raw"}\n',
        '{"step": 1, "kind": "eval_raw", "epoch": 0, "loss": 1, "acc1": null}\n',
    ):
        (tmp_path / "out/model/arm_0/metrics.jsonl").write_text(record)
        with pytest.raises(
            ConfigError, match=r"arm_0: config.yaml or metrics.jsonl is damaged or was written by another program"
        ):
            read_evaluations(tmp_path / "out")


def test_two_runs_of_the_same_arm_and_seed_are_an_error(tmp_path):
    for model in ("first", "second"):
        write_run(tmp_path / f"out/{model}/arm_0", [50.0])
    with pytest.raises(ConfigError, match=r"first/arm_0 and .*second/arm_0 have the same arm and seed; move one of them"):
        read_evaluations(tmp_path / "out")


def test_a_csv_file_with_the_byte_order_mark_of_a_spreadsheet_is_read(tmp_path):
    rows = evaluations_of("arm", {0: [50.0, 60.0]})
    write_csv(tmp_path / "curves.csv", Evaluation._fields, rows)
    (tmp_path / "curves.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "curves.csv").read_bytes())
    assert read_evaluations(tmp_path / "curves.csv") == rows


def test_the_picture_of_a_trace_averages_over_blocks_and_separates_the_convolution():
    rows = [
        Measurement("arm", 0, 1, 5, 50.0, block, form, value, 2.0, 0.5)
        for block, form, value in (("a", OWN, 0.2), ("b", OWN, 0.4), ("a", WITH_CONVOLUTION, 0.9))
    ]
    accuracy_axes, entropy_axes, *_ = scripts.trace_focus.draw(rows).axes
    lines = {line.get_label(): pytest.approx(list(line.get_ydata())) for line in entropy_axes.lines}
    assert lines == {"arm (1 seed)": [0.3], "arm, with the convolution (1 seed)": [0.9]}
    assert [list(line.get_ydata()) for line in accuracy_axes.lines] == [[50.0]]


def test_a_run_without_checkpoints_of_its_evaluations_is_an_error_before_anything_is_measured(tmp_path):
    """A run in progress evaluates before it saves, so only its last checkpoint may be missing."""
    folder = tmp_path / "out/model/arm_0"
    write_run(folder, [50.0, 60.0, 70.0])
    arguments = [tmp_path / "out", "--images", tmp_path, "--csv", tmp_path / "a.csv", "--png", tmp_path / "a.png"]
    (tmp_path / "image.png").write_bytes(b"")
    for updates, missing in ((), 1), ((2,), 2), ((2, 6), 2):
        for number in updates:
            (folder / f"checkpoint_{number:09d}.pth").write_bytes(b"")
        outcome = run_script(scripts.trace_focus, arguments, tmp_path / "log")
        assert outcome.exit_codes == [2]
        assert f"arm_0 has no checkpoint of epoch {missing}; move the run out of the directory, and train" in outcome.output
