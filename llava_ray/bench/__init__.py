"""What only measures: tables of README beside peers and earlier figures."""
