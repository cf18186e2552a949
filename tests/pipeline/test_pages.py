"""A page of one file: everything is in it, and no text can break out."""

import base64
import hashlib
import json
import re

from hypothesis import given
from hypothesis import strategies as st

from pipeline import pages

DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def made(data):
    return pages.page("pipeline.inspecting", "tokens.html", data)


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5))
def test_whatever_the_texts_are_the_page_gives_them_back(data):
    (found,) = DATA.findall(made(data))
    assert json.loads(found) == data
    assert not set(found) & set("<>&\u2028\u2029")


def test_numbers_that_json_does_not_have_are_null():
    assert pages.as_json({"a": [float("nan"), float("inf"), 1.5], "b": (1,)}) == '{"a":[null,null,1.5],"b":[1]}'


def test_a_text_that_looks_like_a_place_stays_a_text():
    (found,) = DATA.findall(made("/*heat.js*/ /*data*/ /*scripts*/"))
    assert json.loads(found) == "/*heat.js*/ /*data*/ /*scripts*/"


def test_the_policy_names_every_script_of_the_page_by_its_hash():
    page = made({})
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in page
    assert "/*" not in re.search(r"script-src [^\"]*", page)[0]
