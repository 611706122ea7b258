from clapsep_cli.cli import run

run()
