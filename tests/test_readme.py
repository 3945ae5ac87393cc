"""The README's Python blocks run, and print what they say."""

import doctest
import re


def test_python_blocks(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    test = doctest.DocTestParser().get_doctest("".join(blocks), {}, "README", "README.md", 0)
    output: list[str] = []
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=output.append)
    assert results.attempted > 10
    assert results.failed == 0, "".join(output)


def test_commands_are_where_ci_looks_for_them(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    for name, program in (("solve", "nksolve solve bratu"), ("test", "pytest")):
        block = re.search(rf"<!-- command: {name} -->\n```sh\n(.*?)\n```", text, re.DOTALL)
        assert block is not None and program in block[1]
