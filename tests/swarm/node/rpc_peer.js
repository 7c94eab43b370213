// @hyperswarm/rpc over framed TCP: `serve` answers, `call PORT` calls what the other side answers and prints what came, as JSON.
const RPC = require('@hyperswarm/rpc')
const { dht } = require('./framed')

const [, , role, port] = process.argv
const initiator = Buffer.alloc(32, 0x11)
const responder = Buffer.alloc(32, 0x22)

const said = []
const methods = {
  echo: (value) => value,
  nothing: () => null,
  late: (value) => new Promise((resolve) => setTimeout(resolve, 20, value)),
  large: (value) => Buffer.alloc(Number(value.toString()), 7),
  said: () => Buffer.from(said.join()),
  say: (value) => { said.push(value.toString()) },
  boom: () => { throw new Error('it broke') },
  coded: () => { throw Object.assign(new Error('no model of this name'), { code: 'unknown_model', context: '["digits"]' }) },
  strange: () => { throw Object.assign(new Error('strange'), { code: 'ESTRANGE', context: 'not JSON' }) }
}

async function serve () {
  const rpc = new RPC({ dht: dht(responder, initiator), keyPair: {} })
  const server = rpc.createServer()
  for (const name of Object.keys(methods)) server.respond(name, methods[name])
  server.on('connection', (client) => {
    server.respond('callback', async (value) => client.request('echo', value))
  })
  await server.listen()
  console.log(server.address().port)
}

async function attempt (call) {
  try {
    const value = await call()
    return { value: value === null ? null : value.length > 64 ? value.length : value.toString() }
  } catch (err) {
    const cause = err.cause && { message: err.cause.message, code: err.cause.code, context: err.cause.context }
    return { message: err.message, code: err.code, cause }
  }
}

async function call () {
  const rpc = new RPC({ dht: dht(initiator, responder, Number(port)), keyPair: {} })
  const client = rpc.connect(responder)
  const ask = (...args) => attempt(() => client.request(...args))
  const results = {
    first: await ask('echo', Buffer.from('early')),
    many: (await Promise.all(Array.from({ length: 300 }, (_, i) => ask('echo', Buffer.from(String(i)))))).map((r) => r.value),
    slow: await ask('slow', Buffer.from('x')),
    empty: await ask('echo', null),
    megabytes: await ask('echo', Buffer.alloc(3 << 20)),
    unknown: await ask('nowhere', Buffer.from('x')),
    forbidden: await ask('secret', Buffer.from('x')),
    broken: await ask('broken', Buffer.from('x')),
    error: await ask('error', Buffer.from('x')),
    oversized: await ask('echo', Buffer.alloc(5 << 20)),
    toolarge: await ask('enormous', null),
    timeout: await ask('never', null, { timeout: 50 })
  }
  client.event('say', Buffer.from('from node'))
  client.rpc.cork()
  const corked = [ask('echo', Buffer.from('a')), ask('slow', Buffer.from('b')), ask('nowhere', null)]
  client.rpc.uncork()
  results.corked = (await Promise.all(corked)).map((r) => r.value || r.code)
  results.heard = await ask('said', null)
  client.rpc.respond('greet', (value) => Buffer.from('hello ' + value))
  results.called = await ask('call me', Buffer.from('node'))
  await client.end()
  console.log(JSON.stringify(results))
}

role === 'serve' ? serve() : call()
