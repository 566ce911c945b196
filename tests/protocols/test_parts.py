import collections

import pytest

from fedknow.protocols import parts
from fedknow.protocols.config import ConfigError
from fedknow.protocols.plugins import load_object


def test_what_a_module_has_goes_by_its_module():
    assert parts.name_part(collections.OrderedDict) == "collections:OrderedDict"
    assert (
        load_object("collections:OrderedDict", "x.name")
        is collections.OrderedDict
    )


def test_a_local_class_is_registered_and_found():
    class Local:
        pass

    name = parts.name_part(Local)
    assert name.startswith("__main__:")
    assert load_object(name, "learner.name") is Local


def test_a_later_object_of_the_same_name_takes_its_place():
    def make():
        class Again:
            pass

        return Again

    old, new = make(), make()
    assert parts.name_part(old) == parts.name_part(new)
    assert parts.find(parts.name_part(new)) is new


def test_a_snapshot_restores_what_was_registered():
    class Carried:
        pass

    name = parts.name_part(Carried)
    table = parts.snapshot()
    parts.restore({name: int})
    assert parts.find(name) is int
    parts.restore(table)
    assert parts.find(name) is Carried


def test_a_snapshot_holds_no_more_than_is_asked_for():
    class Wanted:
        pass

    class Another:
        pass

    name, _ = parts.name_part(Wanted), parts.name_part(Another)
    assert parts.snapshot([name, "er"]) == {name: Wanted}


def test_what_is_in_no_process_says_what_to_do():
    with pytest.raises(ConfigError) as error:
        load_object("__main__:Vanished", "learner.name")
    assert "learner.name = '__main__:Vanished'" in str(error.value)
    assert "go on from Python" in str(error.value)


def test_the_source_of_a_part():
    class Written:
        """Some text."""

    assert '"""Some text."""' in parts.source_of(parts.name_part(Written))
    assert parts.source_of("__main__:Nothing") is None
