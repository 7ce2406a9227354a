import re
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "reparameterize.md"


def test_the_worked_example_of_the_documentation_runs():
    block, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(block, PAGE.name, "exec"), {})
