"""Data sets, one plug-in a file: `build(config, *, seed)` returns a `fedraclora.data.Dataset`."""
