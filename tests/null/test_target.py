"""A target has one spelling."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lensc.backends.base import PROCESSORS, Target
from lensc.backends.errors import UsageError

NAME = st.from_regex(r"[a-z][a-z0-9_.-]{0,12}", fullmatch=True)


@given(st.builds(Target, NAME, st.sampled_from(PROCESSORS), NAME | st.just("")))
def test_round_trip(target: Target) -> None:
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize("text", ["onnxruntime:cpu", "qnn:npu:sm8650", "tensorrt:gpu:sm_90"])
def test_spelling_is_kept(text: str) -> None:
    assert str(Target.parse(text)) == text


def test_slug_is_a_folder_name() -> None:
    assert Target.parse("qnn:npu:sm8650").slug == "qnn-npu-sm8650"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("onnxruntime", "target 'onnxruntime': expected backend:processor or backend:processor:arch"),
        ("", "target '': expected backend:processor"),
        (":cpu", "target ':cpu': expected"),
        ("onnxruntime:", "target 'onnxruntime:': expected"),
        ("a:cpu:b:c", "target 'a:cpu:b:c': expected"),
        ("a:cpu:", "target 'a:cpu:': expected"),
        ("a: cpu", "target 'a: cpu': expected"),
        ("a:tpu", "target 'a:tpu': processor 'tpu' is not one of cpu, gpu, npu"),
        ("a:CPU", "target 'a:CPU': processor 'CPU' is not one of"),
    ],
)
def test_wrong_target_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Target.parse(text)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("text", ["../x:cpu", "a/b:cpu", "a:cpu:../../x", "a:cpu:x\n", "a\\b:cpu"])
def test_target_cannot_leave_a_folder(text: str) -> None:
    """`slug` names a folder of the bundle, and targets are read from manifests."""
    with pytest.raises(UsageError):
        Target.parse(text)
