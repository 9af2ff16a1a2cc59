"""The restricted unpickler: plain dicts come through as numpy wrote them, and nothing else runs."""

import builtins
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.importers.restricted_pickle import load_pickled_dict

MAPPING = {0: "Unknown", 1: "V1v", 2: "V1d", 7: "hV4"}
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)


def saved(path: Path, value: Any) -> Path:
    np.save(path, value, allow_pickle=True)
    return path


def written(path: Path, pickled: bytes) -> Path:
    """An .npy with the header of one object, then the given pickle."""
    saved(path, MAPPING)
    header = path.read_bytes()[: 10 + int.from_bytes(path.read_bytes()[8:10], "little")]
    path.write_bytes(header + pickled)
    return path


class Calls:
    """Pickles as a call of a function, which loading then makes."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


# -- what comes through ------------------------------------------------------------------------------------------------


@in_one_folder
@given(mapping=st.dictionaries(st.integers(-(2**70), 2**70), st.text(), max_size=20))
def test_a_mapping_of_numbers_to_names_is_what_numpy_reads(tmp_path, mapping):
    path = saved(tmp_path / "mapping.npy", mapping)
    assert load_pickled_dict(path) == np.load(path, allow_pickle=True).item() == mapping


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_numpy_1_and_2_and_their_protocols_read_alike(tmp_path, protocol, module):
    array = np.array(MAPPING, dtype=object)
    pickled = pickle.dumps(array, protocol=protocol)
    if protocol == 4:  # the names' lengths are written before them
        pickled = pickled.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c" + bytes([len(module)]) + module)
        pickled = pickled[:2] + pickled[11:]  # frames have lengths too, but needn't be there
    else:
        pickled = pickled.replace(b"numpy._core.multiarray", module)
    assert module in pickled
    assert load_pickled_dict(written(tmp_path / "mapping.npy", pickled)) == MAPPING


def test_keys_and_names_of_numpys_own_types_become_plain(tmp_path):
    path = saved(tmp_path / "mapping.npy", {np.int64(3): np.str_("EBA"), 4: np.float32(0.5)})
    found = load_pickled_dict(path)
    assert found == {3: "EBA", 4: 0.5}
    assert all(type(key) is int for key in found)


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<i2", "|b1", "|u1"])
def test_arrays_of_numbers_keep_dtype_order_and_values(tmp_path, dtype):
    values = np.random.default_rng(0).integers(0, 2, (3, 4, 5)).astype(dtype)
    path = saved(tmp_path / "results.npy", {"c": values, "fortran": np.asfortranarray(values), "none": None})
    found = load_pickled_dict(path)
    for name in ("c", "fortran"):
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)
    assert found["none"] is None


# -- what doesn't ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("function", [os.system, builtins.eval], ids=["system", "eval"])
def test_a_pickle_that_runs_code_is_refused_by_name_and_does_not_run(tmp_path, depth, function):
    marker = tmp_path / "it-ran"
    order = f"touch {marker}" if function is os.system else f"__import__('pathlib').Path({str(marker)!r}).touch()"
    value: Any = Calls(function, order)
    for _ in range(depth):
        value = {1: "V1v", 2: [value]}
    path = saved(tmp_path / "mapping.npy", value)
    with pytest.raises(
        ValueError, match=rf"mapping\.npy.*{function.__module__}\.{function.__name__}.*nothing was run"
    ) as e:
        load_pickled_dict(path)
    assert "\n" not in str(e.value)
    assert not marker.exists()
    np.load(path, allow_pickle=True)  # the same file does run where nothing restricts it: the test can fail
    assert marker.exists()


@pytest.mark.parametrize(
    "function", [np.memmap, np.frombuffer, np.fromfile, getattr, __import__], ids=lambda function: function.__name__
)
def test_other_functions_are_refused_numpys_too(tmp_path, function):
    with pytest.raises(ValueError, match=f"{function.__name__}, which could run code"):
        load_pickled_dict(saved(tmp_path / "mapping.npy", {1: Calls(function, "os")}))


def test_the_names_that_are_allowed_can_not_be_changed_or_misused(tmp_path):
    state = b"}\x8c\x04name\x8c\x06scalars"  # {"name": "scalar"}
    for name in (b"ndarray", b"dtype"):
        changed = b"\x80\x04\x8c\x05numpy\x8c" + bytes([len(name)]) + name + b"\x93" + state + b"b."
        with pytest.raises(ValueError, match=rf"it changes numpy's {name.decode()}"):
            load_pickled_dict(written(tmp_path / "mapping.npy", changed))
    called = b"\x80\x04\x8c\x05numpy\x8c\x07ndarray\x93J\xff\xff\xff\x7f\x85R."
    with pytest.raises(ValueError, match=r"it calls numpy\.ndarray"):
        load_pickled_dict(written(tmp_path / "mapping.npy", called))


def test_an_array_of_objects_within_the_dict_is_refused(tmp_path):
    path = saved(tmp_path / "results.npy", {"inner": np.array([{1: "a"}, None], dtype=object)})
    with pytest.raises(ValueError, match="dtype 'O8'"):
        load_pickled_dict(path)


def test_a_made_up_place_in_the_memo_takes_no_memory(tmp_path):
    huge = b"\x80\x04}r\xff\xff\xff\x7f."  # LONG_BINPUT 2147483647
    assert load_pickled_dict(written(tmp_path / "mapping.npy", huge)) == {}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (np.arange(3), "of no dict"),
        (np.array([{1: "a"}, {2: "b"}], dtype=object), "of no dict"),
        ([1, 2], "of no dict"),
        (np.array("text"), "of no dict"),
        ({(1, 2): "a"}, "no dict by text or whole numbers"),
        ({1.5: "a"}, "no dict by text or whole numbers"),
    ],
    ids=["numbers", "two-objects", "list", "text", "tuple-key", "float-key"],
)
def test_what_is_no_such_dict_is_told(tmp_path, value, told):
    with pytest.raises(ValueError, match=rf"mapping\.npy.*{told}.*download"):
        load_pickled_dict(saved(tmp_path / "mapping.npy", value))


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"mapping\.npy is missing; download"):
        load_pickled_dict(tmp_path / "mapping.npy")


@in_one_folder
@given(data=st.data())
def test_a_damaged_file_is_an_error_of_one_line_or_still_a_dict(tmp_path, data):
    content = bytearray(saved(tmp_path / "mapping.npy", {**MAPPING, 9: np.arange(3.0)}).read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.npy"
    path.write_bytes(content)
    told = ""
    try:
        assert type(load_pickled_dict(path)) is dict
    except ValueError as error:
        told = str(error)
    assert told == "" or (str(path) in told and "\n" not in told)
