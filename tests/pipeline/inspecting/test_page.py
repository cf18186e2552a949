"""The page of planted runs: whatever a model writes stays text, and what is not there is told."""

import json
import re
import shutil

import pyarrow as pa
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pipeline.artifacts import Outbox
from pipeline.catalog import EXPERIMENT_FILE
from pipeline.contracts import LABELS, POLICY, ROLLOUTS
from pipeline.inspecting.page import build
from pipeline.inspecting.samples import HEAD, TAIL

HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><img src=x onerror='window.hacked = 2'>",
    "line\u2028separator \u202eright to left",
    "/*data*/ /*scripts*/ {{title}} ${1 + 1}",
    "\x1b[31mred\x07 & &amp; \"quoted\" 'single' `tick`",
    "größer 😀 汉字",
    "javascript:alert(1)",
)


def bytewise():
    """A tokenizer that knows every byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZER = bytewise()


def made(path, contract, rows=(), **inputs):
    fingerprint = "".join(path.parts[-2:]).ljust(8, "x")
    outbox = Outbox(
        path, contract, contract.name, 1, fingerprint, {}, {name: [one.record()] for name, one in inputs.items()}
    )
    if rows:
        outbox.write(0, pa.Table.from_pylist(rows, schema=contract.schema(rows[0])))
    else:
        (outbox.path / "tokenizer.json").write_text(TOKENIZER.to_str())
    return outbox.commit()


def planted(run, iterations=1, texts=HOSTILE, prompt="2 + 2 = <b>?</b>"):
    """A run whose responses are these texts."""
    run.mkdir(parents=True)
    (run / EXPERIMENT_FILE).write_text('name = "</script><b>"\n[recipe]\nname = "<i>"\n[scale]\niterations = 2\n')
    policy = made(run.parent / "base" / "sft", POLICY)
    for iteration in range(iterations):
        key = [{"prompt_id": f"p{number}", "sample": 0} for number in range(len(texts))]
        rollouts = made(run / f"{iteration:04d}" / "rollouts-0", ROLLOUTS, [
            {**one, "prompt_tokens": TOKENIZER.encode(prompt).ids,
             "response_tokens": (ids := TOKENIZER.encode(text).ids), "response": text,
             "sampler_logprobs": [-0.125] * (len(ids) - 1) + [-2.0], "finish": "stop", "seed": 0}
            for one, text in zip(key, texts, strict=True)
        ], policy=policy)  # fmt: skip
        made(run / f"{iteration:04d}" / "labels-0", LABELS, [
            {**one, "reward": float(number), "correct": None, "gold": None, "extracted": text, "target": None,
             "verdict": text, "vote_share": None, "keep": False, "dropped": text}
            for number, (one, text) in enumerate(zip(key, texts, strict=True))
        ], rollouts=rollouts)  # fmt: skip
        policy = made(run / f"{iteration:04d}" / "policy", POLICY, policy=policy)
    return run


def data_of(text):
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


@pytest.fixture
def show(tmp_path, opened):
    """Build and open the page of some runs."""

    def build_and_open(*runs, promoted=None, **options):
        file = tmp_path / "page.html"
        file.write_text(build(runs, promoted or {}), encoding="utf-8", newline="\n")
        shown = opened(file, **options)
        shown.wait_for_selector("html[data-ready]")
        return shown

    return build_and_open


def printable(text):
    return re.sub(
        "[\x00-\x1f\x7f-\x9f\u2028\u2029\u202e]", lambda one: f"\\u{ord(one[0]):04x}", text
    )  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_a_model_writes_stays_text(tmp_path, show, scheme):
    shown = show(
        planted(tmp_path / "<img src=x>"), promoted={tmp_path / "<img src=x>": "<u>0000</u>"}, color_scheme=scheme
    )
    assert shown.locator("#list .row .text").all_inner_texts() == [printable(text) for text in HOSTILE]
    for number, text in enumerate(HOSTILE):
        shown.locator("#list .row").nth(number).click()
        assert "".join(shown.locator("#detail .heat .token").all_inner_texts()) == printable(text)
        assert shown.locator("#detail pre").first.inner_text() == "2 + 2 = <b>?</b>"
        assert printable(text).split("\\")[0].strip() in printable(shown.locator("#detail .facts").inner_text())
    assert shown.locator("main img, main b, main i:not(.legend i), main u, header img, header b, header u").count() == 0
    assert shown.locator("h1").inner_text() == "<img src=x>"
    assert "<u>0000</u>" in shown.locator(".run").inner_text()
    assert shown.evaluate("window.hacked") is None
    assert shown.locator("#experiments pre").inner_text().startswith('name = "</script><b>"')


def test_texts_are_found_as_they_were_written(tmp_path, show):
    shown = show(planted(tmp_path / "run"))
    for text in HOSTILE:
        shown.fill("#search", max(re.split("[\x00-\x1f]", text), key=len))
        assert shown.locator("#count").inner_text().split()[0] == "1", text
    shown.fill("#search", "2 + 2 = <B>")
    assert shown.locator("#count").inner_text().split()[0] == str(len(HOSTILE)), "prompts are searched, in any case"


def test_the_policy_of_the_page_lets_nothing_else_run(tmp_path, browser):
    file = tmp_path / "page.html"
    file.write_text(build([planted(tmp_path / "run")], {}), encoding="utf-8")
    context = browser.new_context(offline=True)
    shown, refused = context.new_page(), []
    shown.on("console", lambda message: refused.append(message.text))
    shown.goto(file.as_uri())
    shown.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.hacked = 3";
            const place = document.createElement("div");
            place.innerHTML = "<img src='data:image/png,x' onerror='window.hacked = 4'>";
            document.body.append(script, place);
            fetch("https://example.com").catch(() => 0);
        }"""
    )
    shown.wait_for_selector("div > img", state="attached")
    shown.wait_for_timeout(200)
    assert shown.evaluate("window.hacked") is None
    assert len([text for text in refused if "Content Security Policy" in text]) >= 3
    policy = shown.locator("meta[http-equiv]").get_attribute("content")
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy.split("script-src")[1].split(";")[0]
    context.close()


def test_nothing_in_the_page_points_elsewhere(tmp_path):
    text = build([planted(tmp_path / "run")], {})
    head = text.split('<script type="application/json"')[0]
    places = re.findall(r"""(?:src|href)\s*=\s*["']?([^"' >]*)""", head)
    assert len(places) > 5 and all(place.startswith("#") for place in places)
    assert "http" not in re.sub("http-equiv", "", head)


def test_the_page_of_one_iteration_has_points_and_says_what_is_missing(tmp_path, show):
    shown = show(planted(tmp_path / "run"))
    assert "1 of 2" in shown.locator(".run").inner_text()
    assert "not finished" in shown.locator(".run").inner_text()
    assert "not evaluated" in shown.locator(".run").inner_text()
    for plot in shown.query_selector_all(".plot"):
        plot.scroll_into_view_if_needed()
    shown.wait_for_selector(".plot:not([data-drawn])", state="detached")
    assert shown.locator('#histograms .plot[data-chart="length"] .heatmaplayer image').count() == 1
    missing = shown.locator("#missing").inner_text()
    for name in (
        "held-out accuracy (no evaluation yet",
        "entropy (no update yet)",
        "explained variance (the recipe has",
    ):
        assert name in missing
    assert "undefined" not in shown.locator("body").inner_text()
    assert "NaN" not in shown.locator("body").inner_text()


def test_a_long_response_keeps_its_beginning_and_its_end(tmp_path):
    text = "a" * 3000 + "the end"
    samples = data_of(build([planted(tmp_path / "run", texts=(text,))], {}))["samples"]
    pieces = [samples["pieces"][number] for number in samples["rows"]["pieces"][0]]
    assert len(pieces) == HEAD + 1 + TAIL
    assert "".join(pieces).endswith("the end")
    assert pieces[HEAD] == f"\n[... {3007 - HEAD - TAIL:,} tokens are not in this page ...]\n"
    logprobs = samples["rows"]["logprobs"][0]
    assert (logprobs[HEAD], logprobs[-1], len(logprobs)) == (None, -2, len(pieces))


def test_responses_whose_tokenizer_is_gone_are_shown_without_tokens(tmp_path, show):
    run = planted(tmp_path / "run")
    shutil.rmtree(tmp_path / "base")
    shown = show(run)
    assert shown.locator("#list .row").count() == len(HOSTILE)
    assert shown.locator("#detail .heat").count() == 0
    assert shown.locator("#detail pre").nth(1).inner_text() == HOSTILE[0]
    shown.locator("summary").first.click()
    assert "the tokenizer of these responses is gone" in shown.locator("#how").inner_text()


def test_thousands_of_responses_are_shown_a_page_at_a_time(tmp_path, show):
    shown = show(planted(tmp_path / "run", iterations=4, texts=[f"text {number}" for number in range(100)]))
    total = int(shown.locator("#count").inner_text().split()[0])
    assert total > 100
    assert shown.locator("#list .row").count() == 50
    shown.locator("#next").click()
    assert shown.locator("#pages").inner_text() == f"page 2 of {-(-total // 50)}"


def test_one_prompt_is_followed_through_the_iterations_of_training(tmp_path, show):
    shown = show(planted(tmp_path / "run", iterations=3, texts=("first", "second")))
    assert shown.locator("#detail .same button span:first-child").all_inner_texts() == [
        f"iteration {iteration}" for iteration in range(3)
    ]
    shown.locator("#detail .same button").nth(2).click()
    assert "training, iteration 2" in shown.locator("#detail h3").inner_text()


def test_paper_shows_every_chart(tmp_path, show):
    shown = show(planted(tmp_path / "run", iterations=2))
    shown.evaluate("dispatchEvent(new Event('beforeprint'))")
    shown.wait_for_selector(".plot:not([data-drawn])", state="detached")
    shown.emulate_media(media="print")
    assert shown.locator("#filters").is_hidden()
    assert len(shown.pdf()) > 10_000
