"""Pickles are read as what they hold; forged ones are refused in a process that lives."""

import io
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from htfa_jax.data import safe_pickle
from htfa_jax.data.pickled_arrays import CODES
from htfa_jax.errors import DataError

DTYPES = st.builds(
    lambda code, order: np.dtype(order + code), st.sampled_from(CODES), st.sampled_from("<>")
)
ARRAYS = DTYPES.flatmap(
    lambda dtype: hnp.arrays(
        dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3)
    )
)
KEYS = st.text(max_size=4) | st.binary(max_size=4) | st.integers(-9, 9) | st.none()
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | ARRAYS
    | ARRAYS.map(np.asfortranarray)
    | ARRAYS.map(lambda x: x.transpose(np.roll(np.arange(x.ndim), 1)))
    | ARRAYS.filter(lambda x: x.size > 0).map(lambda x: x.reshape(-1)[0]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=8,
)


def same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected, strict=True)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            same(a, b)
    else:
        np.testing.assert_equal(found, expected)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(VALUES, st.integers(0, pickle.HIGHEST_PROTOCOL), st.booleans())
def test_what_pickle_writes_is_read(value, protocol, old):
    content = pickle.dumps(value, protocol)
    if old and protocol < 4:  # as NumPy 1 names it; later protocols say the lengths of names
        content = content.replace(b"numpy._core.", b"numpy.core.")
    same(safe_pickle.loads(content), value)


def test_the_pure_writer_is_read_too():
    value = {"a": np.arange(6.0).reshape(2, 3), "b": [b"", "x", (1, 2, 3, 4)]}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        file = io.BytesIO()
        pickle._Pickler(file, protocol).dump(value)
        same(safe_pickle.loads(file.getvalue()), value)


def test_values_that_come_twice():
    array, text = np.eye(3), "a long text"
    found = safe_pickle.loads(pickle.dumps([array, array, text, {"t": text}]))
    assert found[0] is found[1] and found[2] == found[3]["t"] == text


# What Python 2 and NumPy 1 wrote: texts are bytes of any value, flags numbers.
def text2(content):
    return b"U" + bytes([len(content)]) + content


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def dtype(code=b"f8", order=b"<", rest=b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00", version=3):
    made = name("numpy", "dtype") + text2(code) + b"K\x00K\x01\x87R"
    return made + b"(K" + bytes([version]) + text2(order) + rest + b"tb"


def array(kind=None, shape=b"K\x02\x85", content=bytes(16), version=1, fortran=b"\x89"):
    empty = name("numpy.core.multiarray", "_reconstruct") + name("numpy", "ndarray")
    empty += b"K\x00\x85" + text2(b"b") + b"\x87R"
    state = b"(K" + bytes([version]) + shape + (dtype() if kind is None else kind) + fortran
    return empty + state + text2(content) + b"tb"


def test_python_2():
    entries = text2(b"objTrans") + array(content=np.array([1.5, -2.0]).tobytes())
    entries += text2(b"objName") + text2(b"caf\xe9") + text2(b"handPose") + b"N"
    found = safe_pickle.loads(b"\x80\x02}(" + entries + b"u.")
    np.testing.assert_array_equal(found.pop("objTrans"), [1.5, -2.0])
    assert found == {"objName": "caf\xe9", "handPose": None}
    assert safe_pickle.loads(b"(dp0\nS'a\\xe9'\np1\nI01\ns.") == {"a\xe9": True}


def entries(fields):
    """A dtype with fields: the rest of its state."""
    return b"N(" + text2(b"a") + b"t" + fields + b"K\x01K\x01K\x00"


FORGED = {
    "object": array(dtype(b"O8", b"|")),
    "field behind its item": array(
        dtype(b"V1", b"|", entries(b"}(" + text2(b"a") + dtype(b"S8", b"|") + b"J\0\x10\0\0\x86u"))
    ),
    "fields of a plain type": array(dtype(rest=entries(b"}"))),
    "item size": array(dtype(rest=b"NNNJ\0\0\0\x10K\x01K\0")),
    "alignment": array(dtype(rest=b"NNNJ\xff\xff\xff\xffK\x40K\0")),
    "flags": array(dtype(rest=b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3f")),
    "subarray": array(dtype(rest=b"(" + dtype() + b"K\x09tNN" + b"J\xff\xff\xff\xff" * 2 + b"K\0")),
    "version of a type": array(dtype(version=4)),
    "byte order": array(dtype(order=b"=")),
    "no byte order": array(name("numpy", "dtype") + text2(b"f8") + b"K\x00K\x01\x87R"),
    "text": array(dtype(b"U4", b"<")),
    "too few bytes": array(shape=b"K\x03\x85"),
    "more bytes than there are": array(shape=b"J\xff\xff\xff\x7f\x85"),
    "overflow": array(shape=b"(" + b"\x8a\x08" + struct.pack("<q", 2**62) + b"K\x08t"),
    "negative": array(shape=b"J\xff\xff\xff\xff\x85"),
    "100 axes": array(shape=b"(" + b"K\x01" * 100 + b"t"),
    "empty and endless": array(
        shape=b"(K\0" + (b"\x8a\x06" + struct.pack("<q", 2**44)[:6]) * 3 + b"t", content=b""
    ),
    "truth": array(dtype(b"b1", b"|"), content=b"\x01\x07"),
    "list of objects": array()[: -2 - 18] + b"]tb",
    "version of an array": array(version=2),
    "flag": array(fortran=b"K\x05"),
    "unfinished": name("numpy.core.multiarray", "_reconstruct")
    + name("numpy", "ndarray")
    + b"K\x00\x85"
    + text2(b"b")
    + b"\x87R",
    "ndarray called": name("numpy", "ndarray") + b"K\x05\x85R",
    "ndarray given a state": name("numpy", "ndarray") + b"}b",
    "dtype called": name("numpy", "dtype") + b"K\x05\x85R",
    "another dtype": name("numpy", "dtype") + array() + b"K\0K\1\x87R",
    "a name alone": name("numpy", "dtype"),
    "a state on a list": b"]}b",
    "an array that is set": array() + b"K\x00K\x01s",
    "an array that grows": array() + b"K\x00a",
    "chumpy": name("chumpy.ch", "Ch") + b")R",
    "its own function": name("htfa_jax.data.pickled_arrays", "_encode") + b"}b",
    "dotted": b"\x8c\x05numpy\x8c\x0dndarray.dumps\x93",
    "instance": b"(ios\nsystem\n",
    "object opcode": b"(" + name("numpy", "dtype") + b"o",
    "new": name("numpy", "dtype") + b")\x81",
    "extension": b"\x82\x01",
    "persistent": b"Pa\n",
    "out of band": b"\x97",
    "deep": b"]" * 100_000 + b"a" * 99_999,
    "deep tuple": b")" + b"\x85" * 100_000,
    "deep key": b"})" + b"\x85" * 100_000 + b"Ns",
    "itself": b"]q\0h\0a",
    # Each tuple holds the last one three times.
    "billion": b")" + b"22\x87" * 40,
    "long number": b"\x8b\x10\x27\0\0" + b"\x7f" * 10_000,
    "digits": b"L" + b"9" * 5000 + b"L\n",
    "bytes": b"\x8e" + struct.pack("<Q", 2**40),
    "text8": b"\x8d" + struct.pack("<Q", 2**62),
    "frame": b"\x95" + struct.pack("<Q", 2**40),
    "memo": b"h\x07",
    "no mark": b"t",
    "nothing": b"",
    "set": b"\x8f",
    "many steps": b"N0" * 2**20,
    "bytes many times": b"]" + text2(bytes(200)) + b"q\1" + dtype(b"u1", b"|") + b"q\0" + b"".join(
        name("numpy.core.numeric", "_frombuffer") + b"(h\1h\0K\xc8\x85U\1CtRa" for _ in range(20)
    ),
}  # fmt: skip


@pytest.mark.parametrize("content", FORGED.values(), ids=FORGED)
def test_a_forged_pickle_is_a_sentence(tmp_path, content):
    path = tmp_path / "a.pkl"
    for whole in (b"\x80\x02" + content + b".", b"\x80\x02}" + text2(b"k") + content + b"s."):
        path.write_bytes(whole)
        with pytest.raises(DataError, match="a.pkl cannot be read: ") as caught:
            safe_pickle.load(path)
        assert len(str(caught.value)) < 600


def test_a_forged_pickle_ends_no_process(tmp_path):
    """In a process of their own, where nothing else would notice memory that was written to."""
    for number, content in enumerate(FORGED.values()):
        (tmp_path / f"{number}.pkl").write_bytes(b"\x80\x02" + content + b".")
    script = (
        "import sys, pathlib\nfrom htfa_jax.data import safe_pickle\n"
        "from htfa_jax.errors import DataError\n"
        "for path in pathlib.Path(sys.argv[1]).glob('*.pkl'):\n"
        "    try: str(safe_pickle.load(path))\n"
        "    except DataError: print('refused')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.count("refused")) == (0, len(FORGED)), done.stderr[-500:]


def test_an_array_cannot_be_written_through():
    with pytest.raises(ValueError, match="read-only"):
        safe_pickle.loads(b"\x80\x02" + array() + b".")[0] = 1


def test_a_large_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_pickle, "MAX_BYTES", 2**20)
    with (tmp_path / "a.pkl").open("wb") as file:
        file.truncate(2**21)
    with pytest.raises(DataError, match="a.pkl has 2 MiB, more than 1"):
        safe_pickle.load(tmp_path / "a.pkl")


def test_a_name_is_said():
    with pytest.raises(ValueError, match="it names 'chumpy.ch.Ch'"):
        safe_pickle.loads(FORGED["chumpy"] + b".")
