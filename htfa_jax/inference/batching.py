"""Many pairs in batches: images are read ahead, and a bad pair spoils only its own result."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from htfa_jax.common.logs import progress
from htfa_jax.config import Config
from htfa_jax.errors import ConfigError, DataError, HTFAError
from htfa_jax.inference.inputs import LoadedPair, PairLike, as_record, load_pair
from htfa_jax.inference.results import Result

Query = str | Sequence[str | None] | None
# From scenes, their queries and the number of rows they are padded to, to their results.
Work = Callable[[list[LoadedPair], list[Query], int], list[Result | list[Result]]]


def in_batches(
    config: Config,
    pairs: Sequence[PairLike | LoadedPair],
    queries: Sequence[Query] | str | None,
    batch_size: int,
    work: Work,
) -> Iterator[Result | list[Result]]:
    """Results of many pairs, in order, as they come.

    Args:
      config: of the run.
      pairs, queries: as in `HTFAInference.batch_infer`.
      batch_size: pairs at a time.
      work: gives the results of a batch.

    Raises:
      ConfigError, DataError: for a batch size or queries that cannot be; what is wrong with a
        pair is in its result.
    """
    if queries is None or isinstance(queries, str):
        queries = [queries] * len(pairs)
    if len(queries) != len(pairs):
        raise DataError(f"{len(pairs)} pairs and {len(queries)} queries: expected one each")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1")
    # A short last batch has a shape of its own only if it is the only one.
    rows = min(batch_size, 1 << (len(pairs) - 1).bit_length()) if pairs else 1

    def read(i: int) -> LoadedPair | DataError:
        pair = pairs[i]
        if isinstance(pair, LoadedPair):
            return pair
        try:
            return load_pair(as_record(pair, f"pair {i}"), config)
        except DataError as error:
            return error

    def group(start: int) -> list[concurrent.futures.Future]:
        return [pool.submit(read, i) for i in range(start, min(start + rows, len(pairs)))]

    with (
        concurrent.futures.ThreadPoolExecutor(config.data.num_threads) as pool,
        progress(len(pairs), "pairs", unit="pair") as bar,
    ):
        ahead = group(0)
        for start in range(0, len(pairs), rows):
            # The next images are read while the model works on these.
            ready, ahead = ahead, group(start + rows)
            found = [future.result() for future in ready]
            results = _batch(found, list(queries[start : start + len(found)]), rows, work)
            bar.update(len(found))
            yield from results


def _batch(
    found: list[LoadedPair | DataError], queries: list[Query], rows: int, work: Work
) -> list[Result | list[Result]]:
    results = [_failed(query, error) for query, error in zip(queries, found, strict=True)]
    read = {i: scene for i, scene in enumerate(found) if isinstance(scene, LoadedPair)}
    if read:
        scenes, asked = list(read.values()), [queries[i] for i in read]
        try:
            done = work(scenes, asked, rows)
        except HTFAError:
            # One pair's question or mask may be what is wrong: each by itself.
            done = [_alone(s, q, work) for s, q in zip(scenes, asked, strict=True)]
        for i, result in zip(read, done, strict=True):
            results[i] = result
    return results


def _alone(scene: LoadedPair, query: Query, work: Work) -> Result | list[Result]:
    try:
        return work([scene], [query], 1)[0]
    except HTFAError as error:
        return _failed(query, error)


def _failed(query: Any, error: Any) -> Any:
    """Results that hold an error, as many as there were questions."""
    if query is None or isinstance(query, str):
        return Result(query=query or "", error=str(error))
    return [Result(query=q or "", error=str(error)) for q in query]
