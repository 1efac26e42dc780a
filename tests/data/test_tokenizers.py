"""Tokenizers: nearest codes, exactness, and OpenAI's pickles without trusting them."""

import importlib.util
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from vimpac.data import tokenizers as tokenizer_module
from vimpac.data.tokenizers import DalleVAE, PatchVQ, load_tokenizer, to_patches
from vimpac.errors import InputError


def random_frames(count=5, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


@pytest.fixture(scope="module")
def patch_vq():
    return PatchVQ.fit(random_frames(40), codes=64, seed=3)


def test_ids_are_the_nearest_codes(patch_vq):
    frames = random_frames(3, seed=1)
    patches = to_patches(frames).astype(np.int64)
    distances = np.square(patches[:, None] - patch_vq.codebook.astype(np.int64)).sum(-1)
    ids = patch_vq.encode(frames)
    assert ids.dtype == np.uint16 and ids.shape == (3, 4, 4)
    np.testing.assert_array_equal(ids.ravel(), distances.argmin(1))


def test_extreme_pixels_are_exact():
    """The largest sums that occur: black, white, and codes one level away from them."""
    codebook = np.repeat(np.array([[0], [1], [254], [255]], np.uint8), 192, axis=1)
    codebook = np.concatenate([codebook, codebook])
    codebook[4:, 0] = [1, 0, 255, 254]
    vq = PatchVQ(codebook)
    np.testing.assert_array_equal(vq.encode(vq.decode(np.arange(8).reshape(1, 2, 4)[:, :, :2])).ravel(), [0, 1, 4, 5])
    np.testing.assert_array_equal(vq.encode(vq.decode(np.array([[[2, 3], [6, 7]]]))).ravel(), [2, 3, 6, 7])


def test_ids_do_not_depend_on_the_batch(patch_vq, monkeypatch):
    frames = random_frames(9, seed=2)
    ids = patch_vq.encode(frames)
    np.testing.assert_array_equal(np.concatenate([patch_vq.encode(frame[None]) for frame in frames]), ids)
    monkeypatch.setattr(tokenizer_module, "_BLOCK", 7)
    np.testing.assert_array_equal(patch_vq.encode(frames), ids)


def test_patch_layout(patch_vq):
    frames = random_frames(2)
    np.testing.assert_array_equal(to_patches(frames)[5].reshape(3, 8, 8), frames[0, :, 8:16, 8:16])
    ids = patch_vq.encode(frames)
    decoded = patch_vq.decode(ids)
    assert decoded.dtype == np.uint8 and decoded.shape == frames.shape
    np.testing.assert_array_equal(decoded[1, :, 24:, 8:16], patch_vq.codebook[ids[1, 3, 1]].reshape(3, 8, 8))
    np.testing.assert_array_equal(patch_vq.encode(decoded), ids)


@pytest.mark.parametrize("wrong", [-1, 64, 8193])
def test_ids_that_are_not_this_tokenizers(patch_vq, wrong):
    ids = np.full((1, 2, 2), 63)
    ids[0, 1, 1] = wrong
    with pytest.raises(InputError, match=rf"id {wrong} is outside the vocabulary .* expected 0\.\.63"):
        patch_vq.decode(ids)


def test_fit_finds_clusters_and_is_seeded():
    generator = np.random.default_rng(0)
    centres = generator.integers(20, 236, (16, 192))
    noisy = centres[generator.integers(0, 16, 4000)] + generator.integers(-3, 4, (4000, 192))
    vq = PatchVQ.fit(noisy.astype(np.uint8), codes=16, seed=0)
    nearest = np.square(vq.codebook[:, None].astype(int) - centres).mean(-1).min(0)
    assert (nearest < 2).all()
    assert vq.digest == PatchVQ.fit(noisy.astype(np.uint8), codes=16, seed=0).digest
    assert vq.digest != PatchVQ.fit(random_frames(40), codes=16, seed=0).digest


def test_fewer_distinct_patches_than_codes():
    frames = np.repeat(np.arange(5, dtype=np.uint8), 3 * 64).reshape(5, 3, 8, 8)
    vq = PatchVQ.fit(frames, codes=64)
    assert vq.vocab_size == 5
    np.testing.assert_array_equal(vq.decode(vq.encode(frames)), frames)


@pytest.mark.parametrize("codes", [1, 8193])
def test_codes_out_of_range(codes):
    with pytest.raises(InputError, match=f"codes is {codes}, expected 2 to 8192"):
        PatchVQ.fit(random_frames(), codes)


def test_wrong_frames(patch_vq):
    with pytest.raises(ValueError, match="multiple of 8"):
        patch_vq.encode(random_frames(size=20))
    with pytest.raises(ValueError, match="uint8"):
        patch_vq.encode(random_frames().astype(np.float32))


def test_save_and_load(tmp_path, patch_vq):
    (tmp_path / "store").mkdir()
    patch_vq.save(tmp_path / "store" / "tokenizer.safetensors")
    for path in (tmp_path / "store", tmp_path / "store" / "tokenizer.safetensors"):
        loaded = load_tokenizer(path)
        assert (loaded.digest, loaded.vocab_size, loaded.requested, loaded.seed) == (patch_vq.digest, 64, 64, 3)
        np.testing.assert_array_equal(loaded.encode(random_frames()), patch_vq.encode(random_frames()))


def test_load_refuses_other_files(tmp_path, patch_vq):
    with pytest.raises(InputError, match="does not exist"):
        load_tokenizer(tmp_path / "missing.safetensors")
    with pytest.raises(InputError, match="does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "text.safetensors").write_text("not a tokenizer")
    with pytest.raises(InputError, match="is not a tokenizer"):
        load_tokenizer(tmp_path / "text.safetensors")
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="not a tokenizer of this program"):
        load_tokenizer(tmp_path / "model.safetensors")
    patch_vq.save(tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-100])
    with pytest.raises(InputError, match="is not a tokenizer"):
        load_tokenizer(tmp_path / "cut.safetensors")


needs_dalle = pytest.mark.skipif(
    importlib.util.find_spec("dall_e") is None or importlib.util.find_spec("attr") is None,
    reason="needs `pip install --no-deps dall-e attrs`",
)


@pytest.fixture(scope="module")
def pickles(tmp_path_factory):
    """Small modules pickled as OpenAI did, with the Upsample of an old torch; (folder, encoder, decoder)."""
    folder = tmp_path_factory.mktemp("dalle")
    torch.manual_seed(0)
    encoder = tokenizer_module._dalle_module("encoder").Encoder(n_hid=64, vocab_size=512, n_blk_per_group=1)
    decoder = tokenizer_module._dalle_module("decoder").Decoder(n_hid=64, n_init=16, vocab_size=512, n_blk_per_group=1)
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
    assert DalleVAE.load(tmp_path / "again.safetensors").digest == vae.digest


@needs_dalle
def test_dalle_refuses_other_files(pickles, tmp_path, patch_vq):
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
    patch_vq.save(tmp_path / "vq.safetensors")
    with pytest.raises(InputError, match="holds a patch-vq"):
        DalleVAE.load(tmp_path / "vq.safetensors")
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
