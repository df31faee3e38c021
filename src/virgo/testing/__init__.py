"""Contract kits and fixtures that tests of VIRGO, and of what plugs into it, share."""
