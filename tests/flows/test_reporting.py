"""The page of real runs in a real browser: charts drawn, responses found, nothing wrong in any theme or width."""

import io
import json
import re

import numpy as np
import polars as pl
import pytest
from PIL import Image
from playwright.sync_api import expect

from flows.execute import walk
from flows.promotion import settle
from flows.reporting import REPORT, report
from flows.run import Run, find_experiment
from pipeline.catalog import EXPERIMENT_FILE
from pipeline.errors import ArtifactError, ExperimentError, StorageError
from pipeline.experiment import Experiment

SMALL = (
    "data.demonstrations.count=2000", "data.prompts.count=60", "data.held_out.count=24", "scale.iterations=3",
    "scale.responses=64", "evaluation.samples=4", "evaluation.every=1", "critic.pretrain_responses=64",
    "resources.engine=transformers",
)  # fmt: skip
"""Of the experiment `arithmetic`: seconds instead of minutes."""
BLUE = (0x2F, 0x7E, 0xD8)
"""Colour of the first run."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, here_and_now):
    """Two real runs of `arithmetic`, one with a critic, over a base of their own."""
    root = tmp_path_factory.mktemp("reporting") / "runs"
    made = []
    for recipe, more in (("vapo", ("recipe_changes.vapo.critic.pretrain_steps=4",)), ("grpo", ())):
        experiment = Experiment.load(find_experiment("arithmetic"), (*SMALL, *more), recipe=recipe, name=recipe)
        run = Run(experiment, root, here_and_now)
        run.folder.mkdir(parents=True)
        run.file.write_text(experiment.dump())
        walk(run)
        settle(run)
        made.append(run.folder)
    return made


@pytest.fixture(scope="module")
def page(runs):
    """The page of the run with a critic."""
    report([str(runs[0])], None)
    return runs[0] / REPORT


def data_of(file):
    return json.loads(re.search(r'id="data">(.*?)</script>', file.read_text(encoding="utf-8"), re.DOTALL)[1])


def all_responses(run):
    """Rollouts and labels of a run, read without the code that is tested."""
    frames = []
    for labels in [*run.glob("0*/labels-*"), *run.glob("eval/*/labels")]:
        here = labels.parent
        rollouts = here / labels.name.replace("labels", "rollouts")
        joined = pl.read_parquet(sorted(rollouts.glob("part-*"))).join(
            pl.read_parquet(sorted(labels.glob("part-*"))), on=["prompt_id", "sample"]
        )
        phase = "evaluation" if here.parent.name == "eval" else "loop"
        frames.append(joined.with_columns(phase=pl.lit(phase), iteration=pl.lit(int(here.name))))
    return pl.concat(frames)


def chosen(run, file):
    """Those of them that the page holds."""
    rows = data_of(file)["samples"]["rows"]
    types = {"phase": pl.String, "iteration": pl.Int32, "prompt_id": pl.String, "sample": pl.Int32}
    keys = pl.DataFrame({name: rows[name] for name in types}, schema=types)
    every = all_responses(run).with_columns(base=pl.col("prompt_id").str.replace("#.*", ""))
    found = every.join(keys, on=list(types), how="semi")
    assert found.height == keys.height > 50
    return found


def draw_all(page):
    page.wait_for_selector("html[data-ready]")
    for plot in page.query_selector_all(".plot"):
        plot.scroll_into_view_if_needed()
    page.wait_for_selector(".plot:not([data-drawn])", state="detached")


def pixels(plot):
    return np.asarray(Image.open(io.BytesIO(plot.screenshot())).convert("RGB")).astype(int)


def share_of(image, colour, within=40):
    return float((np.abs(image - np.array(colour)).sum(axis=2) < within).mean())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_chart_is_drawn_with_the_line_of_its_run(opened, page, scheme):
    shown = opened(page, color_scheme=scheme, viewport={"width": 1300, "height": 900})
    draw_all(shown)
    plots = shown.query_selector_all("#curve-charts .plot")
    assert len(plots) == len(data_of(page)["curves"]) > 15
    for plot in plots:
        image = pixels(plot)
        name = plot.get_attribute("data-chart")
        assert share_of(image, BLUE) > 0.0003, name
        assert (image.mean() < 60) == (scheme == "dark"), name
    for plot in shown.query_selector_all("#histograms .plot, #costs .plot"):
        assert len(np.unique(pixels(plot).reshape(-1, 3), axis=0)) > 20


def test_the_button_changes_the_theme_and_the_charts_follow(opened, page):
    shown = opened(page, color_scheme="light")
    draw_all(shown)
    plot = shown.locator(".plot").first
    light = pixels(plot).mean()
    shown.get_by_role("button", name="Change between light and dark").click()
    assert shown.evaluate("document.documentElement.dataset.theme") == "dark"
    assert pixels(plot).mean() < 60 < 200 < light
    shown.reload()
    assert shown.evaluate("document.documentElement.dataset.theme") == "dark"


@pytest.mark.parametrize("width", [390, 820, 1300])
def test_no_width_makes_the_page_scroll_sideways(opened, page, width):
    shown = opened(page, viewport={"width": width, "height": 844})
    draw_all(shown)
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    for plot in shown.query_selector_all(".plot"):
        box = plot.query_selector(".main-svg").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width


def count(shown):
    return int(shown.locator("#count").inner_text().split()[0].replace(",", ""))


def test_filters_leave_what_a_computation_on_the_files_leaves(opened, runs, page):
    rows = chosen(runs[0], page)
    shown = opened(page)
    assert count(shown) == rows.height
    shown.select_option("#f-iteration", "1")
    assert count(shown) == rows.filter(pl.col("iteration") == 1).height
    shown.select_option("#f-phase", "evaluation")
    assert count(shown) == rows.filter((pl.col("iteration") == 1) & (pl.col("phase") == "evaluation")).height
    shown.locator("#clear").click()
    shown.select_option("#f-verdict", "wrong")
    assert count(shown) == rows.filter(~pl.col("gold")).height > 0
    shown.select_option("#f-verdict", "=correct")
    assert count(shown) == rows.filter(pl.col("verdict") == "correct").height > 0
    shown.locator("#clear").click()
    shown.fill("#f-low", "0.5")
    assert count(shown) == rows.filter(pl.col("reward") >= 0.5).height
    shown.fill("#f-high", "0.7")
    assert count(shown) == 0
    assert shown.get_by_text("No response fits.").is_visible()
    shown.locator("#clear").click()
    assert count(shown) == rows.height


def test_search_finds_the_responses_that_hold_the_text(opened, runs, page):
    rows = chosen(runs[0], page)
    text = rows.filter(pl.col("phase") == "loop")["response"].sort()[0]
    shown = opened(page)
    shown.keyboard.press("/")
    shown.keyboard.type(text)
    assert count(shown) == rows.filter(pl.col("response").str.contains(text, literal=True)).height > 0
    assert text in shown.locator("#list .row .text").first.inner_text()


def test_sorting_orders_the_list(opened, runs, page):
    rows = chosen(runs[0], page)
    shown = opened(page)
    shown.select_option("#sort", "length")
    lengths = [int(cell) for cell in shown.locator("#list .row span:nth-child(4)").all_inner_texts()]
    wanted = rows["response_tokens"].list.len().sort(descending=True).to_list()
    assert lengths == wanted[: len(lengths)]
    shown.locator("#direction").click()
    lengths = [int(cell) for cell in shown.locator("#list .row span:nth-child(4)").all_inner_texts()]
    assert lengths == wanted[::-1][: len(lengths)]


def test_one_prompt_is_shown_through_the_evaluations(opened, runs, page):
    rows = chosen(runs[0], page).filter(pl.col("phase") == "evaluation")
    assert (
        rows.group_by("base").agg(pl.col("iteration").n_unique())["iteration"].to_list()
        == [4] * rows["base"].n_unique()
    )
    shown = opened(page)
    shown.select_option("#f-phase", "evaluation")
    title = shown.locator("#detail h3").inner_text()
    base = title.split()[-1]
    those = rows.filter(pl.col("base") == base).sort("iteration")
    told = shown.locator("#detail .same button span:first-child").all_inner_texts()
    assert told == [f"eval. {iteration}" for iteration in those["iteration"]]
    shown.locator("#only-prompt").click()
    assert shown.locator("#prompt-chip").inner_text().startswith(f"prompt {base}")
    assert count(shown) == those.height
    shown.get_by_role("button", name="All prompts again").click()
    assert count(shown) > those.height


def test_tokens_have_the_colours_of_their_numbers(opened, runs, page):
    shown = opened(page)
    options = shown.locator("#column option").all_inner_texts()
    assert options == ["advantages", "values", "returns", "mismatch", "logprobs", "none"]
    title = shown.locator("#detail h3").inner_text()
    _, _, iteration, _, sample, _, prompt_id = title.replace(",", "").split()
    row = all_responses(runs[0]).filter(
        (pl.col("phase") == "loop") & (pl.col("iteration") == int(iteration))
        & (pl.col("sample") == int(sample)) & (pl.col("prompt_id") == prompt_id)
    ).row(0, named=True)  # fmt: skip
    shown.select_option("#column", "logprobs")
    spans = shown.locator("#detail .heat .token")
    assert spans.count() == len(row["response_tokens"])
    assert re.sub("<[a-z]+>", "", "".join(spans.all_inner_texts())) == row["response"]
    colours = spans.evaluate_all("all => all.map(one => one.style.backgroundColor)")
    reds = [int(colour.removeprefix("rgb(").split(",")[1]) for colour in colours]
    logprobs = np.round(row["sampler_logprobs"], 4)
    assert len(set(colours)) > 1
    assert reds[int(np.argmin(logprobs))] == min(reds), "the least likely token is the reddest"
    spans.first.hover()
    assert shown.locator(".heat-told").inner_text().startswith("token 0:")


def test_keys_choose_responses_and_turn_pages(opened, page):
    shown = opened(page)
    shown.locator("#list").focus()
    first = shown.locator("#list .row[aria-selected=true]").get_attribute("id")
    shown.keyboard.press("ArrowDown")
    assert shown.locator("#list .row").nth(1).get_attribute("aria-selected") == "true"
    assert shown.locator("#list").get_attribute("aria-activedescendant") != first
    shown.keyboard.press("PageDown")
    assert shown.locator("#pages").inner_text().startswith("page 2 of")
    shown.keyboard.press("Home")
    assert shown.locator("#list .row[aria-selected=true]").get_attribute("id") == first
    shown.keyboard.press("Enter")
    assert shown.evaluate("document.activeElement.id") == "detail"
    shown.keyboard.press("Escape")
    assert shown.evaluate("document.activeElement.id") == "list"


def test_a_press_on_a_point_leads_to_the_responses_of_its_iteration(opened, page):
    shown = opened(page, viewport={"width": 1300, "height": 900})
    draw_all(shown)
    plot = shown.locator('#curve-charts .plot[data-chart="reward"]')
    plot.scroll_into_view_if_needed()
    area = plot.locator(".nsewdrag").bounding_box()
    shown.mouse.move(area["x"] + area["width"] - 3, area["y"] + area["height"] / 2)
    shown.mouse.click(area["x"] + area["width"] - 3, area["y"] + area["height"] / 2)
    expect(shown.locator("#f-iteration")).to_have_value("2")
    assert count(shown) == sum(at == 2 for at in data_of(page)["samples"]["rows"]["iteration"])


def test_the_lineage_shows_what_the_manifests_say(opened, runs, page):
    shown = opened(page)
    assert shown.locator("#flow-at").evaluate("one => one.selectedOptions[0].text") == "iteration 2"
    names = shown.locator("#flow .name").all_text_contents()
    assert {"rollouts-0", "labels-0", "scores", "advantages", "critic", "policy", "prompts"} <= set(names)
    assert {"0001/policy", "0001/critic"} <= set(names)
    manifest = json.loads((runs[0] / "0002" / "rollouts-0" / "manifest.json").read_text())
    told = (
        shown.locator("#flow .node", has=shown.locator("text", has_text="rollouts-0")).locator(".told").text_content()
    )
    assert told.startswith(f"{manifest['stats']['rows']:.0f} rows · ")
    shown.select_option("#flow-at", label="foundations")
    assert {"demonstrations", "sft", "prompts", "held_out"} <= set(shown.locator("#flow .name").all_text_contents())


def test_the_head_says_what_the_run_came_to(opened, runs, page):
    shown = opened(page)
    head = shown.locator(".run").inner_text()
    labels = [pl.read_parquet(sorted((runs[0] / "eval" / at / "labels").glob("part-*"))) for at in ("0000", "0003")]
    before, after = (one["gold"].mean() for one in labels)
    assert f"{before:.3f} → {after:.3f}" in head
    assert "24 prompts" in head and "3 of 3" in head and "recipe vapo" in head
    assert (runs[0] / "promoted").readlink().name in head


def test_what_is_missing_is_named_with_the_reason(opened, page):
    shown = opened(page)
    assert "KL to reference (the recipe reads no reference)" in shown.locator("#missing").inner_text()
    assert "explained variance" not in shown.locator("#missing").inner_text()


def test_several_runs_share_a_page(opened, runs, capsys):
    report([str(runs[0].parent)], None)
    file = runs[0].parent / REPORT
    told = capsys.readouterr().out
    assert told == f"{file}  {file.stat().st_size / 1e6:,.1f} MB\n"
    shown = opened(file, viewport={"width": 1300, "height": 900})
    draw_all(shown)
    assert sorted(shown.locator(".run h2").all_inner_texts()) == ["grpo", "vapo"]
    both = pixels(shown.locator('#curve-charts .plot[data-chart="reward"]'))
    colours = shown.locator(".run").evaluate_all("all => all.map(one => getComputedStyle(one).borderLeftColor)")
    for colour in colours:
        assert share_of(both, [int(part) for part in re.findall(r"\d+", colour)]) > 0.0003
    assert shown.locator('#curve-charts figure:has([data-chart="explained variance"]) .legend').inner_text() == "vapo"
    differs = shown.locator("#differences").inner_text()
    assert "recipe.advantage.kind" in differs and "gae" in differs and "scale.iterations" not in differs
    total = count(shown)
    shown.select_option("#f-run", "0")
    assert 0 < count(shown) < total
    assert shown.locator("#costs .run-cost").count() == 2


def test_the_same_run_gives_the_same_page(runs, tmp_path):
    for name in ("a.html", "b.html"):
        report([str(runs[0])], tmp_path / "new folder" / name)
    first, second = ((tmp_path / "new folder" / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second
    assert sorted(path.name for path in (tmp_path / "new folder").iterdir()) == ["a.html", "b.html"]


def test_a_run_before_its_first_iteration_has_a_page_that_says_so(opened, runs, tmp_path):
    (tmp_path / EXPERIMENT_FILE).write_text((runs[0] / EXPERIMENT_FILE).read_text())
    report([str(tmp_path)], None)
    shown = opened(tmp_path / REPORT)
    assert "No iteration has sampled anything yet" in shown.locator(".run").inner_text()
    assert "0 of 3" in shown.locator(".run").inner_text()
    assert shown.locator(".plot").count() == 0
    assert shown.get_by_text("This page holds no responses.").is_visible()
    assert "held-out accuracy (no evaluation yet" in shown.locator("#missing").inner_text()


def test_requests_that_cannot_be_met_are_refused(runs, tmp_path):
    with pytest.raises(ArtifactError, match="not a run"):
        report([str(tmp_path)], None)
    with pytest.raises(ArtifactError, match="no run there"):
        report([str(tmp_path / "nothing*")], None)
    with pytest.raises(ExperimentError, match="a directory, not a file"):
        report([str(runs[0])], tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        report([str(runs[0])], tmp_path / "file" / "page.html")
    (tmp_path / EXPERIMENT_FILE).write_text("name = ")
    with pytest.raises(ExperimentError, match="not TOML"):
        report([str(tmp_path)], None)
    assert not (tmp_path / REPORT).exists()


def test_no_run_at_all_is_a_wrong_request(desk):
    assert "Missing argument" in desk.refusal("report")
    assert "no run there" in desk.refusal("report", "nowhere")
