"""Pages of one file that open offline: what a template names is put into it, data as JSON that no text can end.

/*data*/       JSON; whatever characters a text has, it stays one string of it
/*NAME.js*/    the file NAME.js beside the template
/*scripts*/    hashes of the page's own scripts, for its Content-Security-Policy: nothing else may run
/*styles*/     the same of its styles
"""

import base64
import hashlib
import json
import math
import re
from importlib import resources
from typing import Any

_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
_STYLE = re.compile(r"<style>(.*?)</style>", re.DOTALL)
_UNSAFE = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})


def page(package: str, template: str, data: Any, **more: str) -> str:
    """The template of a package with everything put into it; `more` gives the text of further names.

    Numbers that JSON does not have (NaN, infinities) become null.
    """
    files = resources.files(package)

    def put(match: re.Match[str]) -> str:
        name = match[1]
        return more[name] if name in more else (files / name).read_text(encoding="utf-8")

    whole = re.sub(r"/\*([\w-]+\.\w+)\*/", put, (files / template).read_text(encoding="utf-8"))
    for name, part in (("scripts", _SCRIPT), ("styles", _STYLE)):
        whole = whole.replace(f"/*{name}*/", " ".join(_hash(text) for text in part.findall(whole)))
    return whole.replace("/*data*/", as_json(data), 1)


def as_json(data: Any) -> str:
    """JSON for a script element: no text in it can open or close an element."""
    text = json.dumps(_plain(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.translate(_UNSAFE)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
