"""What a client learns before it joins."""

from __future__ import annotations

import pytest

from bract.core.errors import RunError
from bract.transport import federation_pb2 as pb
from bract.transport.announcement import LARGEST, Announcement, question, refuse_question


def test_an_announcement_comes_back():
    said = Announcement(run="20261123-heart", experiment='[experiment]\nname = "heart"\n')
    assert Announcement.read(said.write()) == said


@pytest.mark.parametrize("raw", [b"", b"\xff" * 40, Announcement(run="r", experiment="x" * LARGEST).write()])
def test_a_malformed_announcement_is_refused(raw):
    with pytest.raises(RunError) as refused:
        Announcement.read(raw)
    assert refused.value.code == "frame-invalid"


def test_the_other_version_is_named_on_both_sides():
    with pytest.raises(RunError, match=r"the server \(bract 9\.9\) speaks protocol 99"):
        Announcement.read(pb.Announcement(protocol=99, bract="9.9", run="r").SerializeToString())
    with pytest.raises(RunError, match=r"the client \(bract 9\.9\) speaks protocol 99"):
        refuse_question(pb.Question(protocol=99, bract="9.9").SerializeToString())
    refuse_question(question())


def test_a_question_of_no_form_is_refused():
    with pytest.raises(RunError) as refused:
        refuse_question(b"\xff" * 40)
    assert refused.value.code == "frame-invalid"
