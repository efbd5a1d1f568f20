"""Imported before anything else by every config: MONAI would evaluate these words before `words.take_options` runs.

MONAI imports what "imports" names while it reads a config. Where `common` cannot be found yet, as from a zip that is
run from another folder, it goes on without.
"""

from common.run.words import refuse_early

refuse_early()
