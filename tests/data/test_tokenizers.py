"""PatchVQ and tokenizer files: nearest codes, exactness, and other files refused."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from vimpac.data import patch_vq as patch_vq_module
from vimpac.data.patch_vq import PatchVQ, to_patches
from vimpac.data.tokenizers import load_tokenizer
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
    monkeypatch.setattr(patch_vq_module, "_BLOCK", 7)
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
