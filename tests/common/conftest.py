"""That this file is here puts its folder on the module search path, also for tests in folders below it: `people`."""
