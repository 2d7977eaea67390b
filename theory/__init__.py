"""The theory of q* with its checks, tables and pictures; run from a checkout, not part of the installed packages."""
