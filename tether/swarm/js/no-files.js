// Stands for random-access-file, which Hypercore loads and never uses: its files are files.js.

module.exports = class {}
