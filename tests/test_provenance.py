import json

import pytest
import torch

from diffusers_safe.provenance import FILE_NAME, Provenance, fingerprint


def test_round_trip_and_content(tmp_path):
    record = Provenance("CompVis/stable-diffusion-v1-4", "0" * 16, ["Van Gogh"], "sdd", "xattn", {"seed": 3}, "main")
    record.save(tmp_path)
    assert Provenance.load(tmp_path) == record
    content = json.loads((tmp_path / FILE_NAME).read_text())
    assert content["concepts"] == ["Van Gogh"] and content["versions"]["torch"] == torch.__version__


def test_missing_and_foreign_records(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        Provenance.load(tmp_path)
    (tmp_path / FILE_NAME).write_text('{"model": 1}')
    with pytest.raises(ValueError, match="not a record of ours"):
        Provenance.load(tmp_path)


def test_fingerprint_knows_values_names_and_nothing_else():
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    assert fingerprint(first) != fingerprint(second)
    second.load_state_dict(first.state_dict())
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(torch.nn.Sequential(first)) != fingerprint(first)
