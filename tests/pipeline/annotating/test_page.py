import json
import re

import pytest
from playwright.sync_api import expect

from pipeline.annotating.page import page, write_page

HOSTILE = [
    "</script><script>window.hacked = 1</script>", '<img src="http://evil.test/x" onerror="window.hacked = 2">',
    "<!-- <script> -->\u2028'\"&amp;{{data}}{{policy}}", "=HYPERLINK(1)\n\ttabbed\r\nline",
    "\u202eright to left \u05e9\u05dc\u05d5\u05dd", "\U0001f9ea emoji \u00e9\ufeff\uffff", "nothing\x00here\x1b[31m",
    "", "  \n ",
]  # fmt: skip


@pytest.fixture
def written(tmp_path):
    """Write a page of these questions."""

    def write(*questions, overlap=1, name="annotate.html"):
        write_page(tmp_path / name, questions, overlap)
        return tmp_path / name

    return write


@pytest.fixture
def three(question, written):
    """Three questions that anybody may answer: of 4, 2 and 3 responses."""
    return written(question("a", "aa", "ab", "ac", "ad"), question("b", "ba", "bb"), question("c", "ca", "cb", "cc"))


@pytest.fixture
def begun(opened, three):
    """Open a page under a typed name."""

    def begin(path=three, name="anna", **options):
        found = opened(path, **options)
        found.fill("#name", name)
        found.press("#name", "Enter")
        return found

    return begin


def press(found, *keys):
    for key in keys:
        found.keyboard.press(key)


def badges(found):
    """The rank shown on each card; a hyphen where there is none."""
    return " ".join(found.locator("#cards .badge").all_inner_texts()).replace("\u2013", "-")


def order(found):
    """Tiers as they stand in the order, and what has no rank."""
    tiers = [tier.locator(".chip .letter").all_inner_texts() for tier in found.locator("#tiers .tier").all()]
    rest = "".join(found.locator("#pool .chip .letter").all_inner_texts())
    return " > ".join("=".join(tier) for tier in tiers) + (f" | {rest}" if rest else "")


def saved(found):
    """What the save button downloads: its name, and its lines."""
    with found.expect_download() as waited:
        found.click("#save")
    text = waited.value.path().read_text(encoding="utf-8")
    assert text.endswith("\n")
    return waited.value.suggested_filename, [json.loads(line) for line in text.splitlines()]


def ranks_of(lines):
    return {line["question_id"]: line["ranks"] for line in lines}


def drag(found, source, target, at=0.5):
    """Press the mouse on one thing, move it in steps, and let go over the other."""
    found.locator(source).scroll_into_view_if_needed()
    box = found.locator(source).bounding_box()
    found.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    found.mouse.down()
    found.mouse.move(box["x"] + box["width"] / 2 + 9, box["y"] + box["height"] / 2, steps=3)
    box = found.locator(target).bounding_box()
    found.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * at, steps=5)
    found.mouse.up()


def head(number):
    return f"#cards [data-drag='{number}']"


def test_number_keys_rank_and_what_is_saved_is_what_was_pressed(begun):
    found = begun()
    press(found, "2", "1", "4")
    assert badges(found) == "2 1 4 -"
    press(found, "4")
    assert (badges(found), order(found)) == ("2 1 4 4", "B > A > C=D")
    expect(found.locator("#summary")).to_have_text(re.compile(r"B\s+\u203a\s+A\s+\u203a\s+C = D"))
    press(found, "Enter", "2", "2")
    assert badges(found) == "2 2"
    name, lines = saved(found)
    assert name == "annotations-anna.jsonl"
    seconds = [line.pop("seconds") for line in lines]
    assert all(0 < spent < 60 for spent in seconds)
    assert lines == [
        {"question_id": "q-a", "annotator": "anna", "ranks": {"a/0": 2, "a/1": 1, "a/2": 3, "a/3": 3}},
        {"question_id": "q-b", "annotator": "anna", "ranks": {"b/0": 1, "b/1": 1}},
    ]
    expect(found.locator(".notice")).to_contain_text("2 rankings saved as annotations-anna.jsonl. 1 question of 3 left")


def test_an_unfinished_question_is_not_saved_and_nothing_is_no_file(begun):
    found = begun()
    press(found, "1", "2", "3")
    found.click("#save")
    expect(found.locator(".notice")).to_contain_text("nothing to save yet")
    press(found, "Enter", "1", "1")
    found.locator("#cards [data-rank='2']").last.click()
    found.locator("#cards [data-rank='1']").last.click()
    press(found, "Enter")  # goes on, and does not press the button that was clicked last
    assert found.locator("#count").inner_text() == "Question 3 of 3"
    assert ranks_of(saved(found)[1]) == {"q-b": {"b/0": 1, "b/1": 1}}


def test_cards_dragged_by_the_mouse_make_the_order(begun):
    found = begun()
    drag(found, head(2), "#tiers .gap")
    assert order(found) == "C | ABD"
    drag(found, head(0), "#tiers .gap >> nth=1")
    assert order(found) == "C > A | BD"
    drag(found, head(1), "#tiers .tier >> nth=1")
    assert order(found) == "C > A=B | D"
    drag(found, head(3), "#tiers .gap >> nth=0")
    assert (order(found), badges(found)) == ("D > C > A=B", "3 3 2 1")
    drag(found, "#order [data-chip='0']", "#tiers .gap >> nth=1")
    assert order(found) == "D > A > C > B"
    drag(found, head(3), "#pool")
    assert (order(found), badges(found)) == ("A > C > B | D", "1 3 2 -")
    drag(found, head(3), "#conversation")
    assert order(found) == "A > C > B | D"
    drag(found, "#order [data-chip='3']", "#tiers .tier >> nth=0")
    assert ranks_of(saved(found)[1]) == {"q-a": {"a/0": 1, "a/1": 3, "a/2": 2, "a/3": 1}}


def test_escape_lets_go_of_a_dragged_card(begun):
    found = begun()
    press(found, "1")
    box = found.locator(head(1)).bounding_box()
    found.mouse.move(box["x"] + 60, box["y"] + 10)
    found.mouse.down()
    gap = found.locator("#tiers .gap").first.bounding_box()
    found.mouse.move(gap["x"] + 60, gap["y"] + 4, steps=4)
    expect(found.locator("#ghost")).to_be_visible()
    press(found, "Escape")
    found.mouse.up()
    expect(found.locator("#ghost")).to_have_count(0)
    assert order(found) == "A | BCD"


def test_on_a_phone_taps_give_ranks_and_arrows_and_a_finger_move_them(begun):
    found = begun(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    found.locator("#cards .card >> nth=1").locator("[data-rank='1']").tap()
    found.tap("#toggle")
    for number in (0, 2):
        found.locator(f"[data-chip='{number}'] [data-act='add']").tap()
    assert order(found) == "B > A > C | D"
    found.locator("[data-chip='3'] [data-act='tie']").tap()
    assert order(found) == "B > A > C=D"
    found.locator("[data-chip='3'] [data-act='up']").tap()
    assert order(found) == "B > A > D > C"
    found.locator("[data-chip='1'] [data-act='down']").tap()
    assert order(found) == "A > B > D > C"
    found.locator("[data-chip='0'] [data-act='off']").tap()
    assert (order(found), badges(found)) == ("B > D > C | A", "- 1 3 2")
    finger = found.context.new_cdp_session(found)
    for kind, place in (("Start", "[data-chip='2'] .grip"), ("Move", ".tier >> nth=1"), ("Move", ".tier >> nth=0")):
        box = found.locator(f"#order {place}").bounding_box()
        point = {"x": box["x"] + 8, "y": box["y"] + box["height"] / 2}
        finger.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": [point]})
    expect(found.locator(".tier.over .letter")).to_have_text("B")
    finger.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert order(found) == "B=C > D | A"


def test_it_fits_on_every_width(begun, question, written):
    name = "somebody with a rather long name"
    found = begun(written(*(question(f"n{number}", "x" * 500, *"bcdefghi") for number in range(1000))), name=name)
    press(found, "1", "s")
    for width in (320, 390, 700, 701, 860, 861, 1020, 1021, 1220, 1221, 1600):
        found.set_viewport_size({"width": width, "height": 700})
        assert found.evaluate("document.documentElement.scrollWidth") <= width
        for button in ("#save", "#next"):
            box = found.locator(button).bounding_box()
            assert 0 <= box["x"] < box["x"] + box["width"] <= width
            assert 0 <= box["y"] < box["y"] + box["height"] <= 700


def test_the_keyboard_alone_does_everything(begun):
    found = begun()
    press(found, "ArrowRight", "1", "ArrowLeft", "ArrowLeft")
    assert found.locator(".card.selected").get_attribute("data-response") == "0"
    press(found, "d", "=")
    assert order(found) == "B=D | AC"
    press(found, "Shift+ArrowUp")
    assert order(found) == "D > B | AC"
    press(found, "Shift+ArrowDown", "a", "3", "a", "0")
    assert order(found) == "B > D | AC"
    press(found, "?")
    expect(found.locator("#help")).to_be_visible()
    press(found, "1", "Escape")
    expect(found.locator("#help")).to_be_hidden()
    assert order(found) == "B > D | AC"
    press(found, "9")
    expect(found.locator("#said")).to_have_text("There are only 4 responses")
    press(found, "Enter")
    assert found.locator("#count").inner_text() == "Question 2 of 3"
    found.keyboard.press("Tab")
    press(found, "2", "1", "Shift+Enter")
    assert found.locator("#count").inner_text() == "Question 1 of 3"
    assert order(found) == "B > D | AC"
    with found.expect_download():
        press(found, "Control+s")


def test_undo_takes_back_one_change_after_the_other_wherever_it_was(begun):
    found = begun()
    press(found, "1", "2", "3", "4", "Enter", "1")
    found.click("#undo")
    assert (badges(found), found.locator("#count").inner_text()) == ("- -", "Question 2 of 3")
    press(found, "u", "Control+z")
    assert (badges(found), found.locator("#count").inner_text()) == ("1 2 - -", "Question 1 of 3")
    press(found, "u", "u")
    assert badges(found) == "- - - -"
    expect(found.locator("#undo")).to_be_disabled()


def test_skipped_questions_come_after_the_others_and_progress_is_told(begun):
    found = begun()
    told = found.locator("#progress-text")
    found.click("#skip")
    expect(told).to_have_text("0 of 3 ranked, 1 skipped")
    assert found.locator("#count").inner_text() == "Question 2 of 3"
    press(found, "1", "1")
    found.click("#previous")
    found.click("#first-open")
    assert found.locator("#count").inner_text() == "Question 3 of 3"
    press(found, "s")
    assert found.locator("#count").inner_text() == "Question 1 of 3"
    press(found, "1", "1", "1", "2")
    expect(told).to_have_text("2 of 3 ranked, 1 skipped")
    press(found, "j", "1", "2", "3")
    expect(told).to_have_text("3 of 3 ranked")
    press(found, "u")
    expect(told).to_have_text("2 of 3 ranked, 1 skipped")
    press(found, "3")
    expect(found.locator("#bar")).to_have_attribute("aria-valuenow", "3")
    expect(found.locator("[data-notice='finish']")).to_contain_text("All 3 questions are ranked. Save the file")
    expect(found.locator("#next")).to_be_disabled()
    saved(found)
    expect(found.locator("[data-notice='finish']")).to_have_count(0)
    expect(found.locator(".notice")).to_contain_text("3 rankings saved as annotations-anna.jsonl. That is all")


def test_closing_the_browser_loses_nothing(begun, opened, three, written, question):
    found = begun()
    press(found, "3", "1", "1", "2", "Enter", "2")
    found.reload()
    assert (badges(found), found.locator("#count").inner_text()) == ("2 -", "Question 2 of 3")
    press(found, "1")
    found.close()
    again = opened(three, in_=found)
    assert (badges(again), again.locator("#count").inner_text()) == ("2 1", "Question 2 of 3")
    again.click("#previous")
    assert badges(again) == "3 1 1 2"
    other = opened(written(question("a", "aa", "ab", "ac", "other"), name="other.html"), in_=found)
    expect(other.locator("#name")).to_be_visible()


def test_two_windows_on_the_same_questions_agree(begun, opened, three):
    one = begun()
    two = opened(three, in_=one)
    press(one, "2", "1")
    expect(two.locator("#cards .badge").first).to_have_text("2")
    press(two, "c", "3", "4")
    expect(one.locator("#cards .badge").last).to_have_text("4")
    assert badges(one) == badges(two) == "2 1 3 4"


def test_a_saved_file_goes_on_in_another_browser(begun, opened, three, tmp_path):
    found = begun()
    press(found, "2", "1", "4", "4", "Enter", "1", "2")
    _, lines = saved(found)
    strange = [
        {**lines[0], "annotator": "ben"}, {**lines[0], "question_id": "q-x"}, {**lines[1], "ranks": {"b/0": 1}},
        {**lines[1], "ranks": {"b/0": 1, "b/1": 0}}, {**lines[1], "ranks": {}},
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in [*lines, *strange])
    (tmp_path / "saved.jsonl").write_text(f"\ufeff{text}\nno json\n", encoding="utf-8")
    other = opened(three)
    other.set_input_files("#file", tmp_path / "saved.jsonl")
    expect(other.locator("#notices")).to_contain_text(
        "2 rankings loaded. Left out: 1 line of another annotator, 1 line about questions that are not here, "
        "2 lines with ranks that do not fit the responses, 1 line unreadable."
    )
    assert other.locator("#count").inner_text() == "Question 3 of 3"
    expect(other.locator("#dirty")).to_be_hidden()
    press(other, "1", "1", "1")
    name, more = saved(other)
    assert name == "annotations-anna.jsonl"
    assert ranks_of(more) == {**ranks_of(lines), "q-c": {"c/0": 1, "c/1": 1, "c/2": 1}}
    assert [line["seconds"] >= old["seconds"] for line, old in zip(more, lines, strict=False)] == [True, True]
    press(other, "u", "u", "u", "u")
    assert other.locator("#progress-text").inner_text() == "0 of 3 ranked"


def test_a_file_of_something_else_is_refused(opened, three, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n[2]\nnull\n', encoding="utf-8")
    found = opened(three)
    found.set_input_files("#file", tmp_path / "x.jsonl")
    expect(found.locator("#start-error")).to_contain_text("x.jsonl holds no rankings")


def test_those_who_are_named_see_their_questions_and_nobody_elses(opened, question, written):
    path = written(
        question("a", "aa", "ab", annotators=["ben", "Özlem Ü"]), question("b", "ba", "bb", annotators=["ben"]),
        question("c", "ca", "cb", annotators=["name", "Özlem Ü"]),
    )  # fmt: skip
    found = opened(path)
    expect(found.locator("#name")).to_be_hidden()
    listed = found.locator("#names button").all_inner_texts()
    assert [re.sub(r"\s+", " ", text) for text in listed] == [
        "ben 2 questions",
        "name 1 question",
        "Özlem Ü 2 questions",
    ]
    found.click("[data-name='Özlem Ü']")
    press(found, "1", "2", "Enter")
    assert found.locator("#count").inner_text() == "Question 2 of 2"
    assert found.locator("#conversation .words").inner_text() == "c?"
    name, (line,) = saved(found)
    assert (name, line["annotator"]) == ("annotations-Özlem-Ü.jsonl", "Özlem Ü")
    found.click("#who")
    expect(found.locator("[data-name='Özlem Ü'] .how")).to_have_text("1 of 2 questions ranked")
    for who in ("ben", "name"):
        found.click(f"[data-name='{who}']")
        assert badges(found) == "- -"
        found.click("#who")


def test_a_typed_name_is_one_line_that_can_be_seen(opened, three):
    found = opened(three)
    found.fill("#name", " \u00a0\u200b ")
    found.click("#name-form button")
    expect(found.locator("#start-error")).to_contain_text("Write your name")
    found.fill("#name", "  Zoe\u0308\u200b \u00a0/ <b>x</b> ")
    found.click("#name-form button")
    press(found, "1", "2", "3", "4")
    name, (line,) = saved(found)
    assert line["annotator"] == "Zoë / <b>x</b>"
    assert line["annotator"].isprintable()
    assert name == "annotations-Zoë-b-x-b-.jsonl"


def test_how_many_are_to_rank_is_told(opened, question, written):
    found = opened(written(question("a", "aa", "ab"), overlap=3))
    expect(found.locator("#lead")).to_contain_text("1 question: put the responses")
    expect(found.locator("#lead")).to_contain_text("ranked by 3 people")


def test_whatever_a_text_holds_is_shown_as_text(begun, question, written):
    turns = [{"role": "<b>system</b>", "content": HOSTILE[0]}, {"role": "user", "content": HOSTILE[1]}]
    found = begun(written(question("a", *HOSTILE, messages=turns)))
    shown = found.locator("#cards .words").evaluate_all("nodes => nodes.map(node => node.textContent)")
    assert shown[:6] == HOSTILE[:6]
    assert shown[6:] == ["nothing\u2400here\u241b[31m", "(empty response)", "(only 4 spaces or line breaks)"]
    assert found.locator("#conversation .words").all_inner_texts() == HOSTILE[:2]
    assert found.locator("#conversation .role").first.inner_text() == "<b>system</b>"
    assert found.evaluate("window.hacked") is None
    assert found.locator("#cards img, #cards script, #conversation b").count() == 0
    press(found, *"987654321")
    assert list(saved(found)[1][0]["ranks"].values()) == list(range(9, 0, -1))


def test_nothing_can_run_or_go_out_that_is_not_the_pages_own(browser, three):
    found = browser.new_page()
    found.goto(three.as_uri())
    refused = found.evaluate(
        """async () => {
            const refused = [];
            document.addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
            const add = (tag, what) => document.body.append(Object.assign(document.createElement(tag), what));
            add("script", { textContent: "window.hacked = 1" });
            add("style", { textContent: "body { display: none }" });
            add("img", { src: "http://127.0.0.1:9/x.png" });
            add("iframe", { src: "http://127.0.0.1:9/" });
            await fetch("http://127.0.0.1:9/").catch(() => null);
            await new Promise((done) => setTimeout(done, 100));
            return [...refused, window.hacked ?? "not hacked"];
        }"""
    )
    found.context.close()
    assert sorted(refused) == ["connect-src", "frame-src", "img-src", "not hacked", "script-src-elem", "style-src-elem"]


def test_where_the_browser_keeps_nothing_it_warns_and_works(opened, begun, three):
    found = opened(three)
    found.add_init_script("Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no'); } })")
    found.reload()
    found.fill("#name", "anna")
    found.press("#name", "Enter")
    expect(found.locator("[data-notice='storage']")).to_contain_text("This browser keeps nothing for this page")
    press(found, "1", "2", "3", "4", "Enter", "Shift+Enter")
    assert badges(found) == "1 2 3 4"
    found.click("#who")
    found.fill("#name", "anna")
    found.press("#name", "Enter")
    assert badges(found) == "1 2 3 4"
    assert ranks_of(saved(found)[1]) == {"q-a": {"a/0": 1, "a/1": 2, "a/2": 3, "a/3": 4}}


def test_leaving_with_changes_that_are_in_no_file_asks_first(begun):
    found = begun()
    asked = []
    found.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
    found.reload()
    assert asked == []
    found.click("#cards .card")
    press(found, "1", "2", "3", "4")
    expect(found.locator("#dirty")).to_be_visible()
    found.reload()
    assert asked == ["beforeunload"]
    expect(found.locator("#dirty")).to_be_visible()
    saved(found)
    found.click("#cards .card")
    found.reload()
    assert asked == ["beforeunload"]


def test_long_texts_are_folded_and_open(begun, question, written):
    turns = [{"role": role, "content": "word " * 300} for role in ("user", "assistant", "user")]
    found = begun(written(question("a", "line\n" * 80, "short", messages=turns)))
    first, second = found.locator("#cards .words").all()
    assert first.bounding_box()["height"] < 500
    found.click("#cards .more")
    assert first.bounding_box()["height"] > 1500
    assert second.bounding_box()["height"] < 60
    box = found.locator("#conversation")
    assert box.evaluate("node => node.scrollTop + node.clientHeight + 2 >= node.scrollHeight")
    assert box.bounding_box()["height"] < 450
    found.click("#whole")
    assert box.bounding_box()["height"] > 700


def test_thousands_of_questions_open_one_at_a_time(begun, question, written):
    found = begun(written(*(question(f"n{number}", *"abcd") for number in range(2000))))
    press(found, "4", "3", "2", "1", "Enter")
    assert found.locator("#count").inner_text() == "Question 2 of 2000"
    assert found.locator(".card").count() == 4
    assert ranks_of(saved(found)[1]) == {"q-n0": {"n0/0": 4, "n0/1": 3, "n0/2": 2, "n0/3": 1}}


def test_more_responses_than_keys_are_ranked_in_the_order(begun, question, written):
    found = begun(written(question("a", *(f"text {number}" for number in range(28)))))
    assert found.locator("#cards .letter").all_inner_texts()[25:] == ["Response Z", "Response AA", "Response AB"]
    for _ in range(28):
        found.locator("[data-act='add']").first.dispatch_event("click")
    (line,) = saved(found)[1]
    assert list(line["ranks"].values()) == list(range(1, 29))


def test_no_text_can_end_the_data(question):
    text = page([question("a", *HOSTILE)], 1)
    data = text.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    assert not set("<>&\u2028\u2029") & set(data)
    read = json.loads(data)
    assert [response["text"] for response in read["questions"][0]["responses"]] == HOSTILE


def test_the_digest_names_what_is_asked(question):
    def digest(*questions, overlap=1):
        return re.search(r'"digest":"([0-9a-f]{16})"', page(questions, overlap))[1]

    one = question("a", "x", "y")
    assert page([one], 1) == page([one], 1)
    others = [
        digest(question("a", "x", "z")),
        digest(question("a", "x", "y", annotators=["n"])),
        digest(one, overlap=2),
    ]
    assert len({digest(one), *others}) == 4


def test_the_page_names_no_address(three):
    text = three.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "{{" not in text
