from layerpipe.cli import main

main()
