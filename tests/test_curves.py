"""Learning curves of ablations (scripts/plot_curves.py) and measures of attention along training (scripts/trace_focus.py)."""

import csv
import json
import math
import shutil

import pytest
import torch
from matplotlib.figure import Figure

import scripts.plot_curves
import scripts.trace_focus
from analysis.maps import capture
from analysis.measures import entropy
from jobs.inspect import InspectedImages
from jobs.model import open_model
from jobs.predict import find_images
from scripts.ablation_curves import Point, draw_means, read_points
from scripts.plot_curves import draw_tokens
from scripts.trace_focus import Measurement, over_blocks
from tests.launch import run_main, run_script
from utils.errors import ConfigError
from utils.run_files import list_checkpoints


def write_run(folder, speeds, accuracies, *, batch_size=10, kind="eval_raw"):
    """Write the files of a run with two updates per epoch, and a record of training after each update."""
    folder.mkdir(parents=True)
    options = f"DATA: {{BATCH_SIZE: {batch_size}, GLOBAL_BATCH_SIZE: 0}}\nTRAIN: {{ACCUMULATION_STEPS: 2}}\n"
    (folder / "config.yaml").write_text(options)
    records = []
    for epoch, accuracy in enumerate(accuracies):
        for update in (1, 2):
            speed = speeds[2 * epoch + update - 1]
            records.append({"step": 2 * epoch + update, "kind": "train", "loss": 1.0, "images_per_second": speed})
        evaluation = {"step": 2 * epoch + 2, "epoch": epoch, "loss": 0.5}
        records.append(evaluation | {"kind": "eval_raw", "acc1": accuracy})
        if kind != "eval_raw":
            records.append(evaluation | {"kind": kind, "acc1": accuracy + 5})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))


def test_the_csv_file_of_an_ablation_has_all_evaluations_with_training_times_and_gives_the_same_picture(tmp_path):
    """An update has 10 x 2 images, so two updates at 10 images per second take 4 seconds."""
    write_run(tmp_path / "out/model/focused_function_0", [10, 10, 20, 20], [50.0, 60.0])
    write_run(tmp_path / "out/model/focused_function_1", [10, 10], [52.0])
    write_run(tmp_path / "out/model/softmax_0", [10, 10, 5, 5], [40.0, 41.0], kind="eval_ema")
    arguments = [tmp_path / "out", "--csv", tmp_path / "curves.csv", "--png", tmp_path / "curves.png"]
    outcome = run_script(scripts.plot_curves, arguments, tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert read_points(tmp_path / "curves.csv") == [
        Point("focused function", 0, 1, 2, 50.0, 0.5, 4.0),
        Point("focused function", 0, 2, 4, 60.0, 0.5, 6.0),
        Point("focused function", 1, 1, 2, 52.0, 0.5, 4.0),
        Point("softmax", 0, 1, 2, 45.0, 0.5, 4.0),
        Point("softmax", 0, 2, 4, 46.0, 0.5, 12.0),
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


def test_the_training_time_excludes_an_interruption(tmp_path):
    """Three updates at 10 images per second; during one of them, the process was suspended."""
    folder = tmp_path / "out/model/arm_0"
    write_run(folder, [10, 10], [50.0])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    suspended = {"step": 1, "kind": "train", "images_per_second": 0.001}
    (folder / "metrics.jsonl").write_text("\n".join([json.dumps(suspended), *lines]))
    assert read_points(tmp_path / "out")[0].seconds == 4.0


def test_a_line_is_the_mean_over_seeds_with_a_band_of_one_deviation_and_ends_with_the_shortest_run():
    points = [Point("arm", seed, epoch, epoch, accuracy, 0, 0) for seed, epoch, accuracy in ((0, 1, 10.0), (1, 1, 14.0))]
    points += [Point("arm", 0, 2, 2, 20.0, 0, 0), Point("arm", 1, 2, 2, 20.0, 0, 0), Point("arm", 0, 3, 3, 99.0, 0, 0)]
    points += [Point("other", 0, 1, 1, 77.0, 0, 0), *(Point("arm", seed, 0, 0, math.nan, 0, 0) for seed in (0, 1))]
    axes = Figure().subplots()
    draw_means(axes, points, "arm", "accuracy", x="step", scale=0.5)
    (line,), (band,) = axes.lines, axes.collections
    assert list(line.get_xdata()) == [0.5, 1.0]
    assert list(line.get_ydata()) == [12.0, 20.0]
    limits = {tuple(vertex) for vertex in band.get_paths()[0].vertices}
    deviation = 2 * 2**0.5  # of 10 and 14
    assert limits == {(0.5, 12.0 - deviation), (0.5, 12.0 + deviation), (1.0, 20.0)}


def test_the_time_axis_is_the_number_of_updates_times_the_measured_time_of_a_step():
    points = [Point(arm, 0, 1, 100, 50.0, 0, 0) for arm in ("softmax 64", "linear 64")]
    steps = [
        {"arm": arm, "tokens": 64, "batch_size": 6, "ms_per_image": milliseconds, "peak_memory_mib_per_image": 1}
        for arm, milliseconds in (("softmax 64", 100), ("softmax 64, matrix stored", 300), ("linear 64", 50))
    ]
    by_epoch, by_time, time_axes, memory_axes = draw_tokens(points, steps).axes
    assert [list(line.get_xdata()) for line in by_epoch.lines] == [[1], [1]]
    assert [line.get_xdata()[0] for line in by_time.lines] == pytest.approx([1.0, 0.5])  # 100 updates x 6 images x 0.1 s
    for axes in (time_axes, memory_axes):
        assert [line.get_label() for line in axes.lines] == ["softmax", "softmax, matrix stored", "linear"]


def test_the_trace_of_a_run_has_the_measures_of_its_initial_weights_and_of_every_checkpoint(
    toy_config, toy_data, trained, tmp_path
):
    """In a run with a learning rate of zero, the measures do not change; in another run, they are those of its checkpoints."""
    options = ["TAG", "still_0", "TRAIN.EPOCHS", 1, "TRAIN.BASE_LR", 0.0, "TRAIN.WARMUP_LR", 0.0, "TRAIN.MIN_LR", 0.0]
    arguments = ["--cfg", toy_config, "--data-path", toy_data, "--output", tmp_path / "out", "--opts", *options]
    outcome = run_main(list(map(str, arguments)), tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    shutil.copytree(trained.parent, tmp_path / "out/toy/moving_0")
    arguments = ["--images", toy_data / "val/class0", "--every", 6, "--csv", tmp_path / "focus.csv"]
    outcome = run_script(scripts.trace_focus, [tmp_path / "out", *arguments, "--png", tmp_path / "focus.png"], tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    rows = scripts.trace_focus.read_csv(tmp_path / "focus.csv", Measurement)
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
    write_run(folder, [10, 10], [50.0])
    text = (folder / "metrics.jsonl").read_text().replace('"loss": 0.5', '"loss": null')
    (folder / "metrics.jsonl").write_text(text + '{"step": 3, "kind": "tr')
    for source in (tmp_path / "out", folder):
        outcome = run_script(scripts.plot_curves, [source, "--png", tmp_path / "curves.png"], tmp_path / "log")
        assert outcome.exit_codes == [0], outcome.output
    (point,) = read_points(tmp_path / "out")
    assert (point.accuracy, math.isnan(point.loss)) == (50.0, True)
    axes = Figure().subplots()
    draw_means(axes, [point], "arm", "loss")
    assert [line.get_label() for line in axes.lines] == ["arm (no values)"]


COLUMNS = "arm,seed,epoch,step,accuracy,loss,seconds\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (COLUMNS, "curves.csv: no run has been evaluated yet"),
        (COLUMNS + "arm,0,1,2,high,0.5,1\n", "curves.csv:2: could not convert string to float: 'high'; correct the row"),
        (COLUMNS + "arm,0,1,2\n", "curves.csv:2: the row has more or fewer values than columns; correct the row"),
        (COLUMNS + "arm,0,1,2,50,0.5,1,9\n", "curves.csv:2: the row has more or fewer values than columns; correct the row"),
        ("\0\xff", "curves.csv: expected a CSV file with the columns arm, seed"),
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
    write_run(tmp_path / "out/model/arm_0", [10, 10], [50.0])
    (tmp_path / "out/model/arm_0/metrics.jsonl").write_text('{"step": 1, "kind": "eval_raw"}\n')
    with pytest.raises(ConfigError, match=r"arm_0: config.yaml or metrics.jsonl is damaged or of another program"):
        read_points(tmp_path / "out")


def test_the_picture_of_a_trace_averages_over_blocks_and_separates_the_convolution():
    rows = [
        Measurement("arm", 0, 1, 5, 50.0, block, form, value, 2.0, 0.5)
        for block, form, value in (("a", "own", 0.2), ("b", "own", 0.4), ("a", "own + convolution", 0.9))
    ]
    assert [(row.arm, round(row.entropy, 6)) for row in over_blocks(rows)] == [("arm", 0.3), ("arm, with the convolution", 0.9)]


def test_a_run_without_checkpoints_of_its_evaluations_is_an_error_before_anything_is_measured(tmp_path):
    write_run(tmp_path / "out/model/arm_0", [10, 10], [50.0])
    arguments = [tmp_path / "out", "--images", tmp_path, "--csv", tmp_path / "a.csv", "--png", tmp_path / "a.png"]
    (tmp_path / "image.png").write_bytes(b"")
    outcome = run_script(scripts.trace_focus, arguments, tmp_path / "log")
    assert outcome.exit_codes == [2]
    assert "arm_0 has no checkpoint of an evaluated epoch; train with KEEP_CHECKPOINTS" in outcome.output
