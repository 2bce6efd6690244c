"""beartype as the tests use it: a whole number is a number too, as type checkers have it."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
