"""What a run leaves for those who watch it: events, a status, a page, trackers, progress."""

import csv
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess

import pytest
import torch
from accelerate.tracking import GeneralTracker, register_tracker_class
from plain import plain_config
from ranks import train
from torch import nn

from zo import Trainer
from zo.errors import UserError
from zo.observe.curve import POINTS, Curve
from zo.observe.progress import Progress
from zo.observe.record import Record
from zo.observe.report import MARK, Report, main


def run(folder, *settings, at_call=lambda call: 0.0):
    """Train a net of 12 numbers; ``at_call`` is added to the loss of the n-th forward, from 1."""
    torch.manual_seed(0)
    calls = itertools.count(1)

    def objective(net, batch):
        loss = at_call(next(calls)) + net(batch["x"]).square().sum()
        return torch.stack((loss, torch.tensor(4.0)))

    config = plain_config(
        [
            f"run.dir={folder}",
            "run.steps=6",
            "batch.sequences=4",
            "batch.micro=4",
            "update.schedule=constant",
            *settings,
        ]
    )
    batches = lambda step, column: {"x": torch.ones(4, 3)}  # noqa: E731
    net = nn.Linear(3, 3)
    return Trainer(config, model=net, objective=objective, batches=batches).train()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def status(folder):
    return json.loads((folder / "status.json").read_text())


def test_a_run_that_is_stopped_and_resumed_tells_its_story(tmp_path, capsys):
    folder = tmp_path / "run"

    def stop(call):
        if call == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return 0.0

    run(folder, at_call=stop)
    stopped, events = status(folder), lines(folder / "events.jsonl")
    assert stopped["phase"] == "stopped"
    assert 0 < stopped["step"] < 6
    assert f"SIGTERM ended {folder} after step {stopped['step']} of 6" in events[-1]["text"]
    assert events[-1]["step"] == stopped["step"]
    assert {tuple(event) for event in events} == {("time", "step", "kind", "text")}

    with open(folder / "events.jsonl", "a") as file:
        file.write('{"time": "torn')
    with pytest.raises(UserError):
        run(folder, "run.max_skipped=1", at_call=lambda call: math.nan if call > 9 else 0.0)
    failed = status(folder)
    assert failed["phase"] == "failed"
    assert "no finite loss in 1 steps in a row" in failed["error"]
    again = lines(folder / "events.jsonl")
    assert again[: len(events)] == events
    assert [event["kind"] for event in again[-2:]] == ["warning", "error"]
    assert any("resuming" in event["text"] for event in again[len(events) :])

    summary = run(folder)
    assert status(folder) == {
        "phase": "finished",
        "step": 6,
        "steps": 6,
        "left_s": 0.0,
        "time": status(folder)["time"],
        "summary": summary,
    }
    said = capsys.readouterr().err
    assert all(
        event["text"] in said
        for event in lines(folder / "events.jsonl")
        if event["kind"] != "error"
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml",
        "events.jsonl",
        "metrics.jsonl",
        "report.html",
        "status.json",
        "steps.log",
    ]

    page = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    assert main([str(folder)]) == 0
    assert (folder / "report.html").read_bytes() == page


def test_a_page_of_somebody_else_stays_and_no_run_ends_for_it(tmp_path, capsys):
    folder = tmp_path / "run"
    run(folder, "run.steps=1")
    (folder / "report.html").write_text("a month of work")
    (folder / "status.json").unlink()
    (folder / "status.json").mkdir()
    (folder / "events.jsonl").unlink()
    (folder / "events.jsonl").mkdir()
    assert run(folder, "run.steps=3")["steps"] == 3
    assert (folder / "report.html").read_text() == "a month of work"
    said = capsys.readouterr().err
    assert said.count("warning: report.html cannot be written") == 1
    assert said.count("warning: events.jsonl cannot be written") == 1


def test_a_secret_is_not_recorded(tmp_path):
    record = Record()
    record.event("info", "reading https://me:hunter2@host/data?token=abcdefgh")
    record.open(tmp_path, 0)
    record.close()
    text = (tmp_path / "events.jsonl").read_text()
    assert "hunter2" not in text
    assert "abcdefgh" not in text


def test_a_curve_of_many_steps_has_few_points_and_the_same_mean():
    curve = Curve()
    for step in range(1, 20_001):
        curve.add(step, 2.0 * step, {"loss": step % 7, "rare": step if step % 5 == 0 else math.nan})
    assert POINTS / 2 <= len(curve.points) <= POINTS
    assert curve.count == 20_000
    assert sum(total for total, _ in (p.sums["loss"] for p in curve.points)) == sum(
        step % 7 for step in range(1, 20_001)
    )
    assert sum(count for _, count in (p.sums["rare"] for p in curve.points)) == 4_000
    assert [point.step for point in curve.points[:-1]] == [
        curve.width * n for n in range(1, len(curve.points))
    ]
    assert curve.points[-1].step == 20_000
    assert curve.moving("loss", 800)[-1] == pytest.approx(3.0, abs=0.01)
    assert curve.moving("loss", 1)[-1] == curve.means("loss")[-1]


BAD = '</style><script>document.title = "hacked"</script><img src=x onerror="document.title=1">'


def long_run(folder, steps):
    """Write the folder of a run that goes on, with user text that is meant to harm."""
    folder.mkdir()
    value = {"lr": 1e-3, "step_s": 1.0, "tokens_per_s": 900.0, "host_rss_bytes": 3e9}
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            noise = math.sin(step * step)
            values = {
                "step": step,
                "loss": 0.5 + 1 / step + noise / 4,
                "scalars": [noise, -3.0 * noise],
                **value,
                "pair_spread": 1e-3,
                "pair_resolution": 1e-8,
                "read_bytes": 2**20 * step,
                "wait_share": 0.1,
            }
            file.write(json.dumps(values) + "\n")
            if step % 100 == 0:
                scores = {"accuracy": 1 - 1 / step, BAD: None, "loss": step}
                file.write(json.dumps({"step": step, "eval": scores}) + "\n")
        file.write('{"step": 1, "loss": "no number"}\nnot even JSON\n{"step": torn')
    event = {"time": "2026-01-01T00:00:00+00:00", "step": 1, "kind": "warning", "text": BAD}
    (folder / "events.jsonl").write_text((json.dumps(event) + "\n") * 2000)
    state = {"phase": "training", "step": steps, "steps": 2 * steps, "left_s": 1.0}
    (folder / "status.json").write_text(json.dumps(state | {"time": event["time"]}))
    (folder / "config.yaml").write_text(
        json.dumps({"config": {"data": {"name": BAD}, "model": {"name": "m"}}, "command": BAD})
    )
    shutil.copy(PICTURE, folder / "timeline.png")
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a run of 20,000 steps."""
    from PIL import Image

    global PICTURE
    PICTURE = tmp_path_factory.mktemp("picture") / "timeline.png"
    Image.new("RGB", (1500, 300), "white").save(PICTURE)
    folder = long_run(tmp_path_factory.mktemp("long") / "run", 20_000)
    Report(folder, pytest.fail).write()
    return (folder / "report.html").read_text()


def test_a_page_is_one_small_file(page):
    assert MARK in page.splitlines()[0]
    assert len(page) < 500_000
    assert set(re.findall(r'(?:src|href|url)\s*[=(]\s*"?([a-z]+:)', page)) == {"data:"}
    assert "http:" not in page
    assert "https:" not in page


def test_user_text_is_escaped(page):
    assert "<script>document" not in page
    assert "<img src=x" not in page
    assert page.count("&lt;/style&gt;&lt;script&gt;") > 3


LOOK = """
<iframe width={width} height=900 srcdoc="{page}"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement;
  const seen = (name) => [...page.querySelectorAll(name)].filter((e) => e.getClientRects().length);
  const found = {{
    title: page.title,
    overflow: root.scrollWidth - root.clientWidth,
    steps: seen(".by-step").length,
    text: Math.min(...seen(".mid").map((e) => e.getBoundingClientRect().height || 99)),
  }};
  const svg = seen("svg")[0], box = svg.getBoundingClientRect();
  const outputs = [...svg.closest("figure").querySelectorAll("output")];
  const values = () => outputs.map((e) => e.textContent).join();
  const last = values();
  svg.dispatchEvent(new PointerEvent("pointermove", {{clientX: box.x + box.width * 0.55}}));
  found.pointed = values() != last && svg.textContent.includes("00");
  svg.dispatchEvent(new PointerEvent("pointerleave"));
  found.back = values() == last;
  page.querySelector("button[data-by=time]").click();
  found.hidden = seen(".by-step").length;
  found.times = seen(".by-time").length;
  found.silent = page.getElementById("news").textContent;
  document.body.dataset.found = JSON.stringify(found);
}};
</script>
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
@pytest.mark.parametrize("width", [400, 1280])
def test_a_page_works_in_a_browser(page, tmp_path, width):
    """On a telephone nothing is wider than the screen and no text too small to read."""
    looked = tmp_path / "look.html"
    looked.write_text(
        LOOK.format(width=width, page=page.replace("&", "&amp;").replace('"', "&quot;"))
    )
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}/home",
    ]
    command = ["chromium", *options, "--window-size=1400,1000", "--dump-dom", f"file://{looked}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = json.loads(re.search(r'data-found="(.*?)"', dom)[1].replace("&quot;", '"'))
    assert found.pop("text") >= 9
    assert "silent for" in found.pop("silent")
    steps = found.pop("steps")
    assert steps >= 8
    assert found == {
        "title": "run",
        "overflow": 0,
        "pointed": True,
        "back": True,
        "hidden": 0,
        "times": steps,
    }


class Table(GeneralTracker):
    """A tracker that writes a table."""

    name = "table"
    requires_logging_directory = True

    def __init__(self, run_name, logging_dir, **kwargs):
        super().__init__()
        self.path = logging_dir / f"{run_name}.csv"

    def start(self):
        self.path.parent.mkdir(exist_ok=True)
        self.file = open(self.path, "a", newline="")  # noqa: SIM115

    @property
    def tracker(self):
        return self.file

    def store_init_configuration(self, values):
        assert values["run.steps"] in (3, 4)

    def log(self, values, step=None, **kwargs):
        rank = os.environ.get("RANK", "0")
        csv.writer(self.file).writerows([rank, step, *pair] for pair in values.items())
        self.file.flush()

    def finish(self):
        self.file.close()


class Broken(Table):
    """A tracker whose service goes away."""

    name = "broken"

    def log(self, values, step=None, **kwargs):
        if step == 2:
            raise ConnectionError("no route\nto host")


register_tracker_class(Table)
register_tracker_class(Broken)


def test_trackers_get_the_metrics_and_a_broken_one_ends_nothing(tmp_path, capsys):
    folder = tmp_path / "run"
    summary = run(folder, "run.steps=3", "run.trackers=[table,broken]")
    assert summary["steps"] == 3
    with open(folder / "table" / "zo.csv", newline="") as file:
        rows = [row for row in csv.reader(file) if row[2] == "loss"]
    expected = {line["step"]: line["loss"] for line in lines(folder / "metrics.jsonl")}
    assert {int(step): float(value) for _, step, _, value in rows} == expected
    said = capsys.readouterr().err
    assert said.count("broken failed and is left out: ConnectionError: no route to host") == 1


@pytest.mark.slow
def test_only_rank_0_tracks_and_records(overrides, tmp_path):
    folder = tmp_path / "run"
    settings = [*overrides, f"run.dir={folder}", "run.trackers=[table]"]
    train(settings, ranks=2, prelude=(register_tracker_class, Table))
    with open(folder / "table" / "zo.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert {row[0] for row in rows} == {"0"}
    assert [int(row[1]) for row in rows if row[2] == "dev/accuracy"] == [0, 2, 4]
    events = lines(folder / "events.jsonl")
    assert len([event for event in events if event["kind"] == "score"]) == 3
    assert status(folder)["summary"]["eval"].keys() == {"accuracy", "loss", "details"}


@pytest.mark.parametrize(("name", "said"), [("nothing", "is not known"), ("swanlab", "installed")])
def test_a_tracker_that_cannot_be_used_is_refused_before_a_run(tmp_path, name, said):
    with pytest.raises(UserError, match=rf"run\.trackers={name} .*{said}"):
        run(tmp_path / "run", f"run.trackers=[{name}]")
    assert not (tmp_path / "run").exists()


def test_progress_shows_means_and_changes(capsys):
    said = []
    progress = Progress(40, 0, True, lambda kind, line: said.append((kind, line)))
    values = {"tokens_per_s": 100.0, "device_peak_bytes": 0, "host_rss_bytes": 2**30}
    for step in range(1, 41):
        loss = math.nan if step == 30 else 1.0 + (-1) ** step
        scores = {"accuracy": 0.75}
        progress.step(
            {"step": step, "loss": loss, "step_s": 0.5, **values}, scores, {"accuracy": 0.5}
        )
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("step 40/40  loss 1.0")
    assert "  2.0 steps/s  100 tokens/s  1.00 GiB  dev accuracy 0.75 (+0.25)  0:00 left" in last
    assert said == []
    progress.warn("look here")
    assert said == [("warning", "look here")]
