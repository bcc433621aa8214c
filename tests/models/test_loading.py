"""Errors of loading and of a pipeline's own check are the user's; those of its work are not."""

import pytest

from draftdiff.errors import UserError
from draftdiff.models.loading import inputs_refused, loading


class Pipeline:
    """Checks its height, and fails at width 0 while it works."""

    def check_inputs(self, height):
        if height % 8:
            raise ValueError(f"height must be divisible by 8, got {height}")

    def __call__(self, height, width):
        self.check_inputs(height)
        if width == 0:
            raise ValueError("nothing to draw")


def test_what_a_pipeline_refuses_is_the_users_and_what_fails_later_is_not():
    pipeline = Pipeline()
    with pytest.raises(UserError, match=r"^height must be divisible by 8, got 9$"), inputs_refused(pipeline):
        pipeline(9, 1)
    with pytest.raises(ValueError, match=r"^nothing to draw$") as told, inputs_refused(pipeline):
        pipeline(8, 0)
    assert not isinstance(told.value, UserError) and "check_inputs" not in vars(pipeline)


def test_a_pipeline_without_a_check_is_called_as_it_is():
    with inputs_refused(object()):
        pass


def test_a_model_that_cannot_be_loaded_is_named_in_one_short_line():
    with pytest.raises(UserError, match=r"^model 'a/b' cannot be loaded: KeyError$"), loading("a/b"):
        raise KeyError
    with pytest.raises(UserError) as told, loading("a/b"):
        raise RuntimeError("x\n" * 1000)
    assert "\n" not in str(told.value) and len(str(told.value)) < 400
    with pytest.raises(UserError, match=r"^as it was$"), loading("a/b"):
        raise UserError("as it was")


def test_a_folder_that_was_cloned_without_its_large_files_is_told(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\n")
    said = rf"cannot be loaded: {tmp_path}/vae/model.safetensors is a Git LFS pointer .*: run git lfs pull$"
    with pytest.raises(UserError, match=said), loading(str(tmp_path)):
        raise RuntimeError("header too large")


@pytest.mark.parametrize("word", ["weights_only", "trust_remote_code"])
def test_no_message_advises_to_switch_a_safety_off(word):
    with pytest.raises(UserError) as told, loading("a/b"):
        raise ValueError(f"\x1b[1mset {word} as you like\x1b[0m")
    assert word not in str(told.value) and str(told.value).isprintable()
