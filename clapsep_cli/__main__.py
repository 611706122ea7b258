from clapsep_cli.cli.app import run

run()
