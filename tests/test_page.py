"""The results page: what is in the one file, and in a real browser that its filters work and nothing overlaps."""

import base64
import functools
import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from perf_results import CLOCKS, DEVICE, PROVENANCE, record, without_counts, write_models, write_results

pytest.importorskip("matplotlib")

from matplotlib.text import Text

from perf_plots import __main__ as command
from perf_plots import cases, figures, layers, model_bench
from perf_plots.evidence import EVIDENCE, EvidenceError, moved_bytes, predicted_share, read_evidence
from perf_plots.page import PAGE
from perf_plots.record import COMMITTED, OURS, write
from perf_plots.store import load
from perf_plots.style import FOOTER_LINES, Sheet, footer_lines
from triton_conv.aot import Job
from triton_conv.kernels import KERNELS
from triton_conv.target import KNOWN
from triton_conv.workloads import FLAGSHIPS, KINDS, LECTURE_KINDS, find

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of two devices: five cases and a model on one, a case in float32 on the other, gradients among them."""
    root = tmp_path_factory.mktemp("page")
    write_results(root / "results")
    gradient = record("convnext_dw7", {OURS: 100, "cudnn": 400, "standard": 500})
    write(replace(gradient, workload=replace(gradient.workload, part="weight gradient")), root / "results" / DEVICE)
    write_models(root / "results" / DEVICE, ["convnext_tiny"])
    other = record("mobile_dw5", {OURS: 100, "cudnn": 120, "standard": 700})
    other = replace(other, workload=replace(other.workload, dtype="float32"))
    write(replace(other, provenance=PROVENANCE | {"device": "NVIDIA B200", "arch": "sm_100"}), root / "results/b200")
    assert command.main(["--results", str(root / "results"), "--out", str(root / "out")]) == 1
    return root / "out" / PAGE


def test_one_file_holds_everything(page):
    text = page.read_text()
    loaded = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import', text)
    assert loaded
    assert all(source.startswith(("data:", "#")) for source, _ in loaded), "nothing is fetched"
    assert text.count('<tr class="case"') == 6
    drawn = list(page.parent.rglob("*.svg"))
    pictures = {base64.b64decode(data) for data in re.findall(r"svg\+xml;base64,([^\"]+)", text)}
    assert pictures == {path.read_bytes() for path in drawn}
    shown = html.unescape(text)
    for words in ("broken.json", "CheckError: relative error 0.5", "RuntimeError: no engine", "2.49×", "0.79×",
                  "Whole models", "0123456789ab", "NVIDIA B200", "computed, not measured", "dcnv4"):  # fmt: skip
        assert words in shown, words


def test_text_from_files_is_escaped(tmp_path, monkeypatch):
    without_counts(monkeypatch)
    wrong = record("dilated_1d", {}, error='Error: <script>alert("x")</script>')
    write(wrong, tmp_path / "results" / DEVICE)
    figures.draw_all(tmp_path / "results", tmp_path / "out", say=lambda line: None)
    text = (tmp_path / "out" / PAGE).read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text


def test_a_rehearsal_says_so_on_the_page_and_in_every_figure(tmp_path, monkeypatch):
    without_counts(monkeypatch)
    for workload in FLAGSHIPS:
        made = record(workload.name, {OURS: 100, "cudnn": 90, "standard": 300})
        write(replace(made, measured=False), tmp_path / "results" / "rehearsal")
    figures.draw_all(tmp_path / "results", tmp_path / "out", say=lambda line: None)
    assert "REHEARSAL: made-up times, not a measurement" in (tmp_path / "out" / PAGE).read_text()
    drawn = list((tmp_path / "out" / "rehearsal").glob("*.svg"))
    assert len(drawn) > 8
    for path in drawn:
        assert "REHEARSAL: made-up times, not a measurement" in path.read_text(), path.name


def test_the_evidence_is_what_inspect_writes(tmp_path):
    found = read_evidence(EVIDENCE)
    assert {row["target"] for row in found.rows} == {"sm_90"}
    assert all(row["registers"] > 0 for row in found.rows)
    assert "compilations by Triton" in found.source
    assert any(row["share"].endswith("%") for row in found.rows)
    assert any(row["share"] == "–" for row in found.rows), "of matrix products alone"
    assert read_evidence(tmp_path / "none.json") is None
    broken = tmp_path / "broken.json"
    broken.write_text('{"kernels": [{"kernel": "depthwise"}]}')
    with pytest.raises(EvidenceError, match=r"broken.json: KeyError: 'label'"):
        read_evidence(broken)
    paths, complaints = figures.draw_all(tmp_path, tmp_path / "out", say=lambda line: None, evidence=broken)
    assert any("broken.json" in complaint for complaint in complaints)
    assert (tmp_path / "out" / PAGE) in paths


def test_predicted_traffic_and_share():
    """Tiles of 64 x 64: every operand is read once for 64 of the other."""
    workload = find("dilated_d4")[0]
    problem = workload.problem()
    tile = KERNELS["implicit_gemm"].tile_type(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=2)
    job = Job("implicit_gemm", problem, tile, KNOWN["sm_90"])
    # 8 x 65 x 65 = 33800 pixels, 528.1 tiles of 64; 512 channels, 8 tiles; K = 512 * 9.
    by_hand = 2 * (33800 * 4608 * 8 + 512 * 4608 * 529)
    assert moved_bytes(job) == pytest.approx(by_hand)
    arithmetic = 2 * 33800 * 512 * 4608 / 989e12
    assert predicted_share(job) == pytest.approx(arithmetic / (by_hand / 9.0e12))
    depthwise = find("mobile_dw5")[0].problem()
    job = Job("depthwise", depthwise, KERNELS["depthwise"].safe_tile, KNOWN["sm_90"])
    assert moved_bytes(job) is predicted_share(job) is None


def _texts(figure):
    """Every text that is drawn, with its box."""
    figure.canvas.draw()
    texts = list(figure.texts)
    for axes in figure.axes:
        texts += [*axes.texts, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    for legend in figure.legends:
        texts += legend.get_texts()
    # An annotation's own box would hold its line too.
    return [(t.get_text(), Text.get_window_extent(t)) for t in texts if t.get_text() and t.get_visible()]


def _overlaps(texts):
    """Pairs of texts whose boxes share more than a hair."""
    for index, (text, box) in enumerate(texts):
        for other, its in texts[index + 1 :]:
            width = min(box.x1, its.x1) - max(box.x0, its.x0)
            height = min(box.y1, its.y1) - max(box.y0, its.y0)
            if width > 1 and height > 2:
                yield text, other


def _check_labels(sheet, footer, stem):
    """Instead of writing a figure: no text lies on another, none is cut off at the edge."""
    texts = _texts(sheet.figure)
    assert not list(_overlaps(texts)), stem.name
    assert len(footer_lines(footer)) <= FOOTER_LINES, stem.name
    for text, box in texts:
        assert box.x0 >= 0 and box.x1 <= sheet.figure.bbox.width + 1, (stem.name, text)
    return [stem.with_suffix(".svg")]


def test_no_two_labels_of_other_figures_overlap(monkeypatch, tmp_path):
    """Those of which there are no results yet: sweeps, layers of networks with the longest names, lectures, models."""
    workloads = [max(_of_kind(kind), key=lambda workload: len(workload.name)) for kind in KINDS]
    workloads += [part for workload in workloads for part in workload.parts()[1:]]
    workloads += [*cases.steps(), *cases.lectures(), *cases.sweeps()]
    for workload in workloads:
        made = record("dw3d", {OURS: 100, "cudnn": 90, "standard": 300, "device copy": 20, "torch.compile": 95,
                               "two kernels": 140, "unfold": 900}, clocks=CLOCKS)  # fmt: skip
        write(replace(made, workload=workload), tmp_path / "results" / DEVICE)
    write_models(tmp_path / "results" / DEVICE, model_bench._BATCHES)
    monkeypatch.setattr(Sheet, "save", _check_labels)
    drawn = figures.draw_device(load(tmp_path / "results")[0][0], tmp_path, say=lambda line: None)
    names = {drawing.paths[0].stem for drawing in drawn}
    networks = {f"{kind}_networks{suffix}" for kind in KINDS for suffix in ("", "_gradients")}
    assert networks | {f"sweep_{sweep.name}" for sweep in layers.sweeps()} | set(LECTURE_KINDS) <= names
    assert {"overview_steps", "models_forward", "models_training", "local_gradients"} <= names


def _of_kind(kind):
    return [workload for workload in layers.networks() if workload.kind == kind]


def test_no_two_labels_of_a_figure_overlap(monkeypatch, tmp_path):
    """In every figure of the committed results and of the counts."""
    monkeypatch.setattr(Sheet, "save", _check_labels)
    drawn = figures.draw_computed(tmp_path, say=lambda line: None)
    for device in load(COMMITTED)[0]:
        drawn += figures.draw_device(device, tmp_path, say=lambda line: None)
    names = {drawing.paths[0].stem for drawing in drawn}
    assert {"overview", "roofline", "saving", "shares", "tuning", "depthwise_gradients"} <= names


# --------------------------------------------------------------------------------------------------- in a browser


@functools.cache
def browser():
    """The path of a browser that starts, or why there is none."""
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        return None, f"no browser here ({', '.join(BROWSERS)}); Debian: apt-get install chromium"
    try:
        text = _dump(path, "data:text/html,<p id=a></p><script>a.textContent=6*7</script>", "/tmp")
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{path} does not start: {error}"
    return (path, "") if ">42<" in text else (None, f"{path} does not run a page")


def _dump(path, address, profile):
    """The page as it stands once its scripts have run."""
    options = ["--headless", "--disable-gpu", "--no-first-run", "--virtual-time-budget=4000", "--window-size=1300,900"]
    # A browser run by root, as in a container, has no sandbox.
    options += ["--no-sandbox"] if os.geteuid() == 0 else []
    command = [path, *options, f"--user-data-dir={profile}/browser", "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


@pytest.fixture
def visit(page, tmp_path):
    """Runs JavaScript with `d`, the page's document in a frame of that width, and returns what it returns."""
    path, missing = browser()
    if path is None:
        pytest.skip(missing)

    def visit(script, width=1200):
        content = json.dumps(page.read_text()).replace("</", "<\\/")
        harness = tmp_path / "harness.html"
        harness.write_text(
            f'<meta charset="utf-8"><iframe id="f" style="width:{width}px;height:900px;border:0"></iframe>'
            '<pre id="out"></pre><script>\nf.onload = () => { const d = f.contentDocument;\n'
            f"{_TOOLS}\n"
            'try { out.textContent = "@@" + JSON.stringify((() => {' + script + '})()) + "@@"; }\n'
            'catch (error) { out.textContent = "@@" + JSON.stringify("" + error.stack) + "@@"; } };\n'
            f"f.srcdoc = {content};\n</script>"
        )
        found = re.search(r"@@(.*)@@</pre>", _dump(path, harness.as_uri(), tmp_path), re.DOTALL)
        assert found, "the page's script did not run"
        return json.loads(html.unescape(found[1]))

    return visit


_TOOLS = """
const shown = (element) => element.getClientRects().length > 0;
const set = (id, value) => { const e = d.getElementById(id); e.value = value;
  e.dispatchEvent(new Event("change")); e.dispatchEvent(new Event("input")); };
const cases = () => [...d.querySelectorAll("tr.case")].filter(shown)
  .map((row) => row.dataset.name + (row.dataset.part === "forward" ? "" : " " + row.dataset.part));
const pictures = () => [...d.querySelectorAll("figure")].filter(shown).map((each) => each.dataset.name);
const said = (id) => d.getElementById(id).textContent;
"""


def test_filters(visit):
    found = visit("""
      const result = {all: cases(), mean: said("mean"), failed: said("failed")};
      set("filter-kind", "depthwise");
      result.kind = cases(); result.pictures = pictures(); result.shown = said("shown");
      d.querySelectorAll("details").forEach((each) => { each.open = true; });
      const compiled = [...d.querySelectorAll("#evidence tbody tr")].filter(shown);
      result.compiled = [...new Set(compiled.map((each) => each.dataset.kind))];
      const models = () => [...d.querySelectorAll("#models tbody tr")].filter(shown).map((each) => each.dataset.part);
      result.models = models();
      set("filter-part", "weight gradient");
      result.nomodels = models();
      result.both = cases(); result.worst = said("worst"); result.gradients = pictures();
      set("filter-part", "forward"); result.forwardmodels = models(); set("filter-dtype", "float32");
      result.dtype = cases();
      d.getElementById("reset").click();
      result.reset = cases();
      set("filter-device", "b200");
      result.device = cases(); result.devices = [...d.querySelectorAll("p.device")].filter(shown).length;
      d.getElementById("reset").click(); d.getElementById("filter-losses").click();
      result.losses = cases(); result.wins = said("wins");
      d.getElementById("reset").click(); set("filter-name", "dcn");
      result.name = cases();
      set("filter-kind", "grouped");
      result.none = [cases().length, shown(d.getElementById("none")), said("mean")];
      return result;
    """)
    assert sorted(found["all"]) == sorted([
        "mobile_dw5", "convnext_dw7", "convnext_dw7 weight gradient", "dcnv2", "dilated_1d", "narrow_groups_4",
    ])  # fmt: skip
    # 120/100, 79/100, 400/100 and 250/100, one microsecond on either side.
    assert found["mean"] == "1.75×"
    assert found["failed"] == "1"
    assert sorted(found["kind"]) == ["convnext_dw7", "convnext_dw7 weight gradient", "mobile_dw5"]
    assert found["shown"] == "3"
    assert sorted(found["compiled"]) == ["", "depthwise"], "and probes, which are of no kind"
    assert {"depthwise", "overview", "computed_depthwise"} <= set(found["pictures"])
    assert not {"grouped", "computed_grouped"} & set(found["pictures"])
    assert found["both"] == ["convnext_dw7 weight gradient"]
    assert found["worst"] == "3.97×"
    assert "depthwise_gradients" in found["gradients"]
    assert "depthwise" not in found["gradients"]
    assert sorted(found["models"]) == ["forward", "forward", "forward and backward", "forward and backward"]
    assert (found["nomodels"], found["forwardmodels"]) == ([], ["forward", "forward"])
    assert found["dtype"] == found["device"] == ["mobile_dw5"]
    assert sorted(found["reset"]) == sorted(found["all"])
    assert found["devices"] == 1
    assert sorted(found["losses"]) == ["convnext_dw7", "dcnv2", "dilated_1d"], "a failure is a loss too"
    assert found["wins"] == "0"
    assert found["name"] == ["dcnv2"]
    assert found["none"] == [0, True, "–"]


def test_links_of_the_contents_lead_somewhere_and_a_layer_is_told_in_order(visit):
    found = visit("""
      const ends = [...d.querySelectorAll("#contents a, #list a")].map((a) => a.getAttribute("href").slice(1));
      return {count: ends.length, dead: ends.filter((id) => !d.getElementById(id)), cases: cases(),
              unsteady: [...d.querySelectorAll("tr.case .who")].filter((e) => e.textContent === "unsteady").length};
    """)
    assert found["count"] > 10
    assert not found["dead"]
    # Device by device, kind by kind, a layer's forward pass before its gradients.
    assert found["cases"] == [
        "mobile_dw5", "narrow_groups_4", "convnext_dw7", "convnext_dw7 weight gradient", "dilated_1d", "dcnv2",
    ]  # fmt: skip
    assert found["unsteady"] == 0


def test_a_press_on_a_head_sorts_and_what_has_no_number_comes_last(visit):
    found = visit("""
      const button = d.querySelector('th button[data-sort="vs_library"]');
      button.click();
      const up = cases();
      button.click();
      return [up, cases()];
    """)
    without = ["dcnv2", "dilated_1d"]
    numbered = ["convnext_dw7", "mobile_dw5", "narrow_groups_4", "convnext_dw7 weight gradient"]
    assert found[0][:4] == numbered
    assert found[1][:4] == numbered[::-1]
    assert sorted(found[0][4:]) == sorted(found[1][4:]) == without


def test_an_address_keeps_its_filters(page, tmp_path):
    path, missing = browser()
    if path is None:
        pytest.skip(missing)
    text = _dump(path, f"{page.as_uri()}#kind=depthwise&part=weight%20gradient", tmp_path)
    rows = re.findall(r'<tr class="case"[^>]*>', text)
    assert len(rows) == 6
    kept = [row for row in rows if "hidden" not in row]
    assert len(kept) == 1
    assert 'data-name="convnext_dw7"' in kept[0]


@pytest.mark.parametrize("width", [1200, 390, 320])
def test_nothing_overlaps_or_sticks_out(visit, width):
    found = visit(
        """
      d.querySelectorAll("details").forEach((each) => { each.open = true; });
      const boxes = [...d.querySelectorAll("#filters > *, #summary > *, tr.case > td, #models td, figure > *, h2")]
        .filter(shown).map((e) => [e.textContent.trim().slice(0, 30) || e.alt, e.getBoundingClientRect()]);
      const pairs = [];
      boxes.forEach(([a, x], i) => boxes.slice(i + 1).forEach(([b, y]) => {
        if (Math.min(x.right, y.right) - Math.max(x.left, y.left) > 1 &&
            Math.min(x.bottom, y.bottom) - Math.max(x.top, y.top) > 1) pairs.push([a, b]);
      }));
      const root = d.documentElement;
      const wide = [...d.querySelectorAll("tr.case > td")].filter((e) => e.scrollWidth > e.clientWidth + 1);
      return {count: boxes.length, pairs, scroll: root.scrollWidth, width: root.clientWidth,
              wide: wide.map((e) => e.textContent.trim().slice(0, 40))};
    """,
        width,
    )
    assert found["count"] > 60
    assert not found["pairs"]
    assert found["scroll"] <= found["width"]
    assert not found["wide"]
