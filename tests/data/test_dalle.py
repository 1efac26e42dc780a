"""The DALL-E tokenizer: it computes what OpenAI's modules do, and its pickles are not trusted."""

import importlib.util
import pickle
import sys
import types

import numpy as np
import pytest
import torch

from vimpac.data.dalle import DalleVAE, openai_module
from vimpac.data.tokenizers import load_tokenizer
from vimpac.errors import InputError


def random_frames(count=5, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


needs_dalle = pytest.mark.skipif(
    importlib.util.find_spec("dall_e") is None or importlib.util.find_spec("attr") is None,
    reason="needs `pip install --no-deps dall-e attrs`",
)


@pytest.fixture(scope="module")
def pickles(tmp_path_factory):
    """Small modules pickled as OpenAI did, with the Upsample of an old torch; (folder, encoder, decoder)."""
    folder = tmp_path_factory.mktemp("dalle")
    torch.manual_seed(0)
    encoder = openai_module("encoder").Encoder(n_hid=64, vocab_size=512, n_blk_per_group=1)
    decoder = openai_module("decoder").Decoder(n_hid=64, n_init=16, vocab_size=512, n_blk_per_group=1)
    for module in decoder.modules():
        if isinstance(module, torch.nn.Upsample):
            del module.recompute_scale_factor
    package = types.ModuleType("dall_e")  # pickling looks the classes up by name
    package.__path__ = importlib.util.find_spec("dall_e").submodule_search_locations
    sys.modules["dall_e"] = package
    torch.save(encoder, folder / "encoder.pkl")
    torch.save(decoder, folder / "decoder.pkl")
    del sys.modules["dall_e"]
    return folder, encoder, decoder


@needs_dalle
def test_dalle_agrees_with_its_modules(pickles, tmp_path):
    folder, encoder, decoder = pickles
    DalleVAE.convert(folder / "encoder.pkl", folder / "decoder.pkl", tmp_path / "dalle.safetensors")
    vae = load_tokenizer(tmp_path / "dalle.safetensors")
    frames = random_frames(3)
    ids = vae.encode(frames)
    pixels = 0.8 * (torch.from_numpy(frames).float() / 255) + 0.1
    np.testing.assert_array_equal(ids, encoder(pixels).argmax(1).numpy())
    assert ids.dtype == np.uint16 and ids.shape == (3, 4, 4) and vae.vocab_size == 512
    np.testing.assert_array_equal(vae.encode(frames[1:2])[0], ids[1])

    for module in decoder.modules():
        if isinstance(module, torch.nn.Upsample):
            module.recompute_scale_factor = None
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(ids.astype(np.int64)), 512).permute(0, 3, 1, 2).float()
    expected = 255 * ((decoder(one_hot)[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1)
    decoded = vae.decode(ids)
    assert decoded.dtype == np.uint8 and decoded.shape == frames.shape
    assert np.abs(decoded - expected.detach().numpy()).max() <= 0.501
    with pytest.raises(InputError, match=r"id 512 is outside the vocabulary of this dalle tokenizer"):
        vae.decode(np.full((1, 4, 4), 512, np.uint16))

    vae.save(tmp_path / "again.safetensors")
    assert load_tokenizer(tmp_path / "again.safetensors").digest == vae.digest


@needs_dalle
def test_dalle_refuses_other_files(pickles, tmp_path):
    folder, _, _ = pickles
    encoder, decoder, out = folder / "encoder.pkl", folder / "decoder.pkl", tmp_path / "out.safetensors"
    with pytest.raises(InputError, match="holds a Decoder"):
        DalleVAE.convert(decoder, encoder, out)
    with pytest.raises(InputError, match="does not exist"):
        DalleVAE.convert(tmp_path / "missing.pkl", decoder, out)
    (tmp_path / "text.pkl").write_text("not a pickle")
    with pytest.raises(InputError, match=r"is not OpenAI's encoder\.pkl"):
        DalleVAE.convert(tmp_path / "text.pkl", decoder, out)
    torch.save({"a": torch.zeros(2)}, tmp_path / "dict.pkl")
    with pytest.raises(InputError, match="holds a dict"):
        DalleVAE.convert(tmp_path / "dict.pkl", decoder, out)
    (tmp_path / "cut.pkl").write_bytes(encoder.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"is not OpenAI's encoder\.pkl"):
        DalleVAE.convert(tmp_path / "cut.pkl", decoder, out)
    assert not out.exists()


class Malicious:
    def __reduce__(self):
        return print, ("code ran",)


@needs_dalle
def test_dalle_pickles_cannot_run_code(pickles, tmp_path, capsys):
    torch.save(Malicious(), tmp_path / "evil.pkl")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Malicious(), protocol=2))
    for name in ("evil.pkl", "plain.pkl"):  # in torch's zip, and bare
        with pytest.raises(InputError, match="is not OpenAI's"):
            DalleVAE.convert(tmp_path / name, pickles[0] / "decoder.pkl", tmp_path / "out.safetensors")
    assert "code ran" not in capsys.readouterr().out


def test_dalle_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in [name for name in sys.modules if name.startswith("dall_e")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "encoder.pkl").touch()
    with pytest.raises(InputError, match="pip install --no-deps dall-e attrs"):
        DalleVAE.convert(tmp_path / "encoder.pkl", tmp_path / "decoder.pkl", tmp_path / "out.safetensors")
