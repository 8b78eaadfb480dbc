"""docs/deploy.md, followed word by word."""

import os
import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from experiments.runtimes.processes import MARK, end_marked, program
from fedraclora.files import read_json

GUIDE = Path(__file__).parents[1] / "docs" / "deploy.md"


@pytest.mark.slow
def test_the_guide_leads_to_a_run_over_authenticated_nodes(tmp_path):
    blocks = re.findall(r"^```bash\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 8
    token = "deploy-guide"
    search = f"{Path(program('flwr')).parent}:{os.environ['PATH']}"
    try:
        subprocess.run(
            ["bash", "-euc", "\n".join(blocks)],
            cwd=tmp_path,
            env={**os.environ, "PATH": search, MARK: token},
            check=True,
            timeout=240,
        )
    finally:
        end_marked(token)
    rounds = pd.read_csv(tmp_path / "results" / "rounds.csv").set_index("round")
    assert rounds.index.tolist() == [0, 1, 2, 3, 4, 5]
    assert rounds.loc[1:, "num_ok"].tolist() == [2] * 5
    assert read_json(tmp_path / "results" / "summary.json")["status"] == "finished"
