"""The nearest videos: queries by name and by file, features kept in a folder."""

import numpy as np
import pytest
import torch

from runs import VOCABULARY, tiny_model
from vimpac import weights
from vimpac.config.probe import SimilarConfig
from vimpac.data.store import TokenStore
from vimpac.data.test_clips import TestClips
from vimpac.distributed import World
from vimpac.errors import InputError
from vimpac.evaluation.features import Look, all_vectors
from vimpac.evaluation.normalise import fit_normaliser
from vimpac.evaluation.search import Search, clips_of, find_query
from vimpac.evaluation.subject import open_subject
from vimpac.model import ClassificationModel, PretrainModel

ONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def model(wide, tmp_path):
    torch.manual_seed(0)
    weights.save(PretrainModel(tiny_model()), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def search(model, store_folder, **options):
    config = SimilarConfig(**options)
    subject = open_subject(model, store_folder, config)
    return Search(subject, config, Look(config.layer), "fp32", ONE)


@pytest.mark.parametrize("clips, frames, every", [(1, 3, 1), (2, 3, 1), (5, 3, 2), (3, 8, 1), (1, 3, 4)])
def test_clips_of_a_video_are_those_of_a_store(store_folder, clips, frames, every):
    store = TokenStore(store_folder)
    expected = TestClips(store, np.arange(len(store)), clips, [0], frames, VOCABULARY + 1, every)
    for video in range(5):
        found = clips_of(store.read(video).astype(np.int64), clips, frames, VOCABULARY + 1, every)
        assert np.array_equal(found, expected.read(video, 1))


@pytest.mark.parametrize("vector", ["cls", "mean", "contrastive"])
@pytest.mark.parametrize("normalize", ["none", "center", "whiten"])
def test_nearest_by_hand(model, store_folder, vector, normalize):
    found = search(model, store_folder, vector=vector, normalize=normalize, count=4)
    store = found.subject.store
    plain = all_vectors(found.model, found.subject.clips(clips=3), store.names, Look(), ONE)[vector]
    x = fit_normaliser(plain, normalize)(plain).astype(float)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    cosines = x @ x[7]
    expected = [i for i in np.argsort(-cosines) if i != 7][:4]
    nearest = found.nearest(found.vectors(), 7)
    assert [name for name, _ in nearest] == [store.names[i] for i in expected]
    assert [score for _, score in nearest] == pytest.approx(cosines[expected], abs=1e-6)  # float32 vectors


def test_ids_of_a_video_are_the_video(model, store_folder):
    """As a file it is the nearest to itself, as a name it is left out."""
    found = search(model, store_folder)
    store, vectors = found.subject.store, found.vectors()
    by_ids = found.nearest(vectors, store.read(4).astype(np.int64))
    assert by_ids[0] == (store.names[4], pytest.approx(1, abs=1e-5))  # other batch sizes
    assert [name for name, _ in by_ids[1:]] == [name for name, _ in found.nearest(vectors, 4)][:9]


def test_features_are_kept(model, store_folder, tmp_path):
    plain = search(model, store_folder)
    kept = search(model, store_folder, features=tmp_path / "kept")
    assert np.array_equal(plain.vectors(), kept.vectors())
    again = search(model, store_folder, features=tmp_path / "kept", vector="cls", normalize="whiten")
    again.model.backbone.register_forward_pre_hook(lambda *_: pytest.fail("computed again"))
    assert again.nearest(again.vectors(), 7)
    with pytest.raises(InputError, match="holds other features: clips was 3, now 2"):
        search(model, store_folder, features=tmp_path / "kept", clips=2)


def test_features_of_another_model(model, store_folder, tmp_path):
    search(model, store_folder, features=tmp_path / "kept").vectors()
    torch.manual_seed(1)
    weights.save(PretrainModel(tiny_model()), tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="holds other features: another model "):
        search(tmp_path / "other.safetensors", store_folder, features=tmp_path / "kept")


def test_vectors_that_a_model_lacks(model, store_folder, tmp_path):
    with pytest.raises(InputError, match="no vector contrastive at this layer, expected one of cls, mean"):
        search(model, store_folder, vector="contrastive", layer=0)
    weights.save(ClassificationModel(tiny_model(), 3), tmp_path / "classes.safetensors")
    with pytest.raises(InputError, match="no vector contrastive"):
        search(tmp_path / "classes.safetensors", store_folder, vector="contrastive")


def test_unknown_names(store_folder):
    store = TokenStore(store_folder)
    assert find_query(store, "video-003.mp4", 0) == 3
    with pytest.raises(InputError, match=r"video-03\.mp4 is neither a video of .* nor a file: expected .* video-003\.mp4"):
        find_query(store, "video-03.mp4", 0)
    with pytest.raises(
        InputError, match=r"expected a name of the store, such as video-000\.mp4, video-001\.mp4, video-002\.mp4$"
    ):
        find_query(store, "zzz", 0)
    with pytest.raises(InputError, match=r"such as video-004\.mp4, video-014\.mp4, video-024\.mp4$"):
        find_query(store, "4.mp4", 0)
